"""Views of a result: verdict, table, figures, page, comparison."""
