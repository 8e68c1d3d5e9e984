"""Label contract, label files and readers of other formats."""
