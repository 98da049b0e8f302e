"""One module a group of commands: `add` declares its arguments, each handler imports what it needs when it runs."""

from medforge.commands import ask, audit, config, data, evaluate, keys, model, release, store

GROUPS = (config, data, model, evaluate, release, store, ask, keys, audit)
