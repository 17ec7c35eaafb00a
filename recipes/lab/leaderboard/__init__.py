"""Leaderboard of robustness reports: tables, page, and checks of reports from elsewhere."""
