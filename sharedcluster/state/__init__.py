"""Shared state over Redis: sessions, caches, broadcast, primitives; knows neither Flask nor gevent."""
