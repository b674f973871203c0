"""The gateway: HTTP APIs that existing programs speak, over syscalls. Every caller is a tenant."""
