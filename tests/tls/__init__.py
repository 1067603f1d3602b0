"""`aiojob.tls`, and beside it the loop's own TLS server as the reference."""
