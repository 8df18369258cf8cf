// Package policy decides whether an action may happen: allow, ask or deny.
//
// Claim: one pure function of a policy, an action and its context, the same on
// both sides of the wire, gives the same decision and names the rule that made
// it. What is not named is denied, what cannot be decided is denied, and the
// zero Policy denies everything.
//
// Threat: an agent that was talked into something by what it read. It chooses
// operations, arguments and their order freely, and may hand in policies of its
// own for sub-agents.
//
// Promise: the meet of two policies allows nothing that either of them does
// not; Leq is exact on the order that the rules below define; a policy file is
// read whole or refused with file and line, never partly; as soon as private
// data and untrusted content have met in a session, every way out asks.
//
// # The order
//
// Policies form a lattice, dimension by dimension:
//
//   - operations: never < ask < always; more approvals are stricter; all duties
//     of an operation that is never allowed are one value
//   - paths.roots, commands, hosts: any, or the downset of a list of rules. A <= B
//     iff each rule of A is below a rule of B; meet is the pairwise meets, join
//     the union, both reduced to maximal rules
//   - trusted_origins: such a downset too, without any
//   - paths.blocked: more patterns are stricter, and "**" is the strictest
//   - budget: minimum and maximum
//   - window: intersection and hull; all empty windows are one value
//
// The order is on rules, not on what they add up to: {methods: [GET, POST]} is
// not below the two rules {methods: [GET]} and {methods: [POST]}. The error is on
// the safe side: what Leq calls smaller allows no more.
//
// A policy's name takes no part in the order.
//
// # What is outside
//
// Containment never rests on reading commands: commands and the files that an
// argv names are judged so that a person sees what is asked for, but a program
// that runs can open any file the machine holds. Paths are judged as they are
// written; who opens them resolves links and asks Blocked again for the name
// that was reached.
package policy
