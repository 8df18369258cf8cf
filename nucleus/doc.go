// Package nucleus is the vocabulary that every part of CAL shares: operations,
// requests, decisions, permits, outcomes, grants, log entries, pod
// specifications and error kinds.
//
// It holds data, its canonical bytes and nothing that acts: no files, no
// network, no clock. It imports the standard library alone, so that the node,
// the authority, the guest and an offline verifier read the same bytes in the
// same way without sharing anything else.
package nucleus
