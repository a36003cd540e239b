"""One model that several machines compute at the same time, each with its share of every layer, through `mx.distributed`."""
