"""The policy behind the message format that robot policies are served with, and a client: see README.md beside this file."""
