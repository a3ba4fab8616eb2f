"""Lines of results, made into tables and plots for people."""
