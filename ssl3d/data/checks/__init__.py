"""What may be wrong with files, voxels, cases and cohorts."""
