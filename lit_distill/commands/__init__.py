"""What stands behind each word of the command line (``lit_distill.main`` chooses)."""
