"""What stands in a store, who may write there, and the one place that deletes."""
