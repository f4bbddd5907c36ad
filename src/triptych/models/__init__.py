"""Wirings: how a vision encoder, a connector and a language or text model become one model."""
