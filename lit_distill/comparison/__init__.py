"""One teacher, many methods, one budget, one evaluation, one report."""
