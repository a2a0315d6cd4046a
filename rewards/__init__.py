"""Rewards: from the text of a completion to numbers in a stated range.

`rewards.parse` (host, standard library) reads completions, `rewards.written` scores what only
strings can tell, and `rewards.answers` makes arrays of fixed shape of both. `rewards.format`,
`choice`, `temporal`, `regression` and `length` (JAX) score one component each, and `rewards.dual`
adds them up, by `rewards.weights` and `rewards.options`. `rewards.custom` adds a user's own
function, `rewards.reward` is all of it under one name. Import from those modules: nothing is loaded
here, so that parsing never pulls in JAX.
"""
