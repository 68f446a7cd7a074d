"""Tools that read rows, take measurements apart, or prepare a GPU."""
