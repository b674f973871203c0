"""The console: one page that shows the machine live, and the stream that it lives on."""
