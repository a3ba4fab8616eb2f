"""What moves bytes: arena, queue, service, workers, commit, retention, fetch. No torch in this room."""
