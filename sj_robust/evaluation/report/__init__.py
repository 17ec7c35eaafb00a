"""What is made of a result: verdict, table, figures, page, comparison."""
