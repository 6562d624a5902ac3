"""``chatbridge serve``: ``command`` starts ``app``, which answers ``requests`` over HTTP; it needs an extra."""
