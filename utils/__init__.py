"""Bookkeeping shared by the scripts. Everything that changes learning is in the scripts; nothing here decides."""
