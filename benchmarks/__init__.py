"""One script per question; each ends with one line of key=value figures. Run: .venv/bin/python -m benchmarks.NAME"""
