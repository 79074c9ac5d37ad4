"""What a release is: folders of known layouts become cases."""
