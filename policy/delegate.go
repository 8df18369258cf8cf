package policy

import (
	"encoding/json"

	"cal/nucleus"
)

// Delegate is the policy of a pod that an agent under p asks for: what was requested, and
// nothing that p does not allow. What nu makes p ask for is asked for there too: nu is
// not monotone, and a pod with fewer legs would else do unasked what p asks for. So
// the result, and its nu, are below Nu(p), which is below p. A nil request is for all
// that p has.
func Delegate(p, requested *Policy) *Policy {
	if requested == nil {
		return Nu(p)
	}
	return Meet(Nu(p), requested)
}

// scopeSub refuses a pod whose policy is not below Nu(p): whoever made the action, this is
// where it is held against the policy of the pod that asks.
func (p *Policy) scopeSub(op nucleus.Op, s *nucleus.Sub) scoped {
	switch {
	case s == nil:
		return outside("action", "%s names nothing to do", op)
	case (op == nucleus.SpawnAgent) != (s.Do == nucleus.SubSpawn):
		return outside("action", "%s does not %s", op, s.Do)
	case !s.Do.Makes():
		return scoped{}
	}
	child, err := readDelegated(s.Policy)
	if err != nil {
		return outside("delegation", "the policy of the new pod cannot be read: %v", err)
	}
	if !Leq(child, Nu(p)) {
		return outside("delegation", "the policy of the new pod allows what %s does not", p.title())
	}
	return scoped{}
}

func readDelegated(raw json.RawMessage) (*Policy, error) { return Load("delegated policy", raw) }
