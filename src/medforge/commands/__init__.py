"""One module a group of commands: `add` declares its arguments, each handler imports what it needs when it runs."""

from medforge.commands import (
    ask,
    audit,
    capacity,
    config,
    data,
    evaluate,
    keys,
    model,
    release,
    rollout,
    store,
    storecheck,
)

GROUPS = (config, capacity, data, model, evaluate, release, rollout, store, storecheck, ask, keys, audit)
