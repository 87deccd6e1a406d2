"""The papers' claims on data that anyone has: one command each, resumable, with rows, a figure and a text."""
