"""One file per op: public function, autograd.Function, schema and fakes, in that order."""
