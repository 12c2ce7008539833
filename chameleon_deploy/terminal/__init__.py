"""What the commands share: options, tables, pages and progress."""
