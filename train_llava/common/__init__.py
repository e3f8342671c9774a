"""Used by every part of the package: files, recipes, checks of single arguments."""
