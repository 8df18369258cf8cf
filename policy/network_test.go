package policy

import "testing"

// Network is what a banner calls safe: it may say no only where nothing can be reached.
func TestNetwork(t *testing.T) {
	for text, want := range map[string]bool{
		`operations: {run_bash: always, git_push: ask, create_pr: always}`:                 false,
		`operations: {net_connect: always, web_fetch: always}` + "\nhosts: {only: []}":     false,
		`operations: {run_bash: always}` + "\nhosts: any":                                  false,
		`operations: {net_connect: ask}` + "\nhosts: {only: [{host: a.example, port: 1}]}": true,
		`operations: {web_fetch: always}` + "\nhosts: any":                                 true,
		`operations: {web_search: ask}`:                                                    true,
	} {
		p, err := Load("p", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Network(); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	for name, want := range map[string]bool{"default": false, "local-dev": false, "permissive": true, "web-research": true, "fix-issue": true} {
		p, err := Profile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Network(); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if !Top().Network() || Bottom().Network() {
		t.Errorf("top %v, bottom %v", Top().Network(), Bottom().Network())
	}
}
