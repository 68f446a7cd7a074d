"""Worker threads, memory, progress, pinned copies and process groups: what runs the work, whatever the work is."""
