"""Tests of the papers' claims on data that anyone has: resumable commands with rows, a figure and a text."""
