"""What the chapters stand on and do not teach: errors, files, checkpoints, hardware, metrics.

Importing this package imports nothing heavy; each module loads torch only where it must.
"""
