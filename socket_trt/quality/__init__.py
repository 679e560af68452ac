"""The method, measured: tasks with known answers, methods side by side, and what each keeps of dense attention."""
