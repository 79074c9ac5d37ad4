"""What a file is: suffixes, headers, DICOM series, volumes."""
