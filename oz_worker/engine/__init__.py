"""A task's life: admission, its thread, the verdict, the outbox, recovery."""
