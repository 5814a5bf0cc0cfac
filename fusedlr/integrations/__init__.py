"""What other frameworks want to see: the LRScheduler facade."""
