package policy

import (
	"testing"

	"pgregory.net/rapid"

	"cal/nucleus"
)

// A delegated policy is below Nu of the asking one in every dimension, whatever was asked for,
// and so is its own nu: what the asking pod must ask for is never done unasked below it.
func TestDelegateIsBelow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, asked := draw(t, "p", dimensions), draw(t, "asked", dimensions)
		for _, d := range []*Policy{Delegate(p, asked), Delegate(p, nil), Delegate(Delegate(p, asked), Top())} {
			if !Leq(d, Nu(p)) || !Leq(Nu(d), Nu(p)) {
				t.Fatalf("%#v is not below %#v", d, p)
			}
		}
		if !Leq(Delegate(p, asked), asked) {
			t.Fatalf("more than was asked for")
		}
	})
}

// Whoever made the action: a pod with more than the asking one is denied, with exactly as much
// it is not.
func TestDecideHoldsDelegation(t *testing.T) {
	permissive, err := Profile("permissive")
	if err != nil {
		t.Fatal(err)
	}
	decide := func(p, child *Policy) nucleus.Decision {
		raw, err := child.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		return p.Decide(nucleus.Action{Op: nucleus.SpawnAgent, Sub: &nucleus.Sub{Do: nucleus.SubSpawn, Policy: raw}}, nucleus.Context{})
	}
	if d := decide(permissive, Nu(permissive)); d.Verdict != nucleus.Allow {
		t.Errorf("as much as it has: %+v", d)
	}
	if d := decide(permissive, permissive); d.Rule != "delegation" {
		t.Errorf("what nu takes from it: %+v", d)
	}
	rapid.Check(t, func(t *rapid.T) {
		// Budget and window are left out: a policy with them may be at its end.
		p, child := draw(t, "p", dimensions[:5]), draw(t, "child", dimensions[:5])
		p.duties[opIndex(nucleus.SpawnAgent)] = duty{Always, 1}
		d := decide(p, child)
		if want := Leq(child, Nu(p)); want != (d.Verdict == nucleus.Allow) || !want && d.Rule != "delegation" {
			t.Fatalf("%+v; below: %v", d, want)
		}
	})
	for name, s := range map[string]*nucleus.Sub{
		"no policy": {Do: nucleus.SubSpawn}, "none that can be read": {Do: nucleus.SubSpawn, Policy: []byte(`{"operations":{"execute":"always"}}`)},
		"another operation's": {Do: nucleus.SubCreate, Policy: []byte(`{"operations":{}}`)}, "nothing": nil,
	} {
		if d := permissive.Decide(nucleus.Action{Op: nucleus.SpawnAgent, Sub: s}, nucleus.Context{}); d.Verdict != nucleus.Deny {
			t.Errorf("%s: %+v", name, d)
		}
	}
}
