"""One guarded step on labels, for models that no trainer holds."""

import warnings


def supervised_step(model, guard, optimizer, domain, ids, labels=None, stepped=lambda: None):
    """`stepped` is called between the optimizer's step and the guard's."""
    with guard.domain(domain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No completions of domain")
        model(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
        guard.before_step()
        optimizer.step()
        stepped()
        guard.after_step()
        optimizer.zero_grad()
