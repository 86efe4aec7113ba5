"""`kdq study`: runs the runs that a file lists, one after the other or several at once, and resumes them."""
