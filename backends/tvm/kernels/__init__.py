"""Kernel templates, one file per family: plain data in, one ``tirx.PrimFunc`` in destination-passing style out."""
