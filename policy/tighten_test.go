package policy

import (
	"testing"

	"pgregory.net/rapid"

	"cal/nucleus"
)

// A repository's own policy can only take away, whatever it says.
func TestTightenNeverLoosens(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, own := draw(t, "p", dimensions), draw(t, "own", dimensions)
		raw, err := own.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		tightened, err := Tighten(p, "own", raw)
		if err != nil {
			t.Fatal(err)
		}
		if !Leq(tightened, p) {
			t.Fatalf("tightened policy is not below the person's")
		}
	})
}

// What a repository leaves out stays as the person has it; what it names is met.
func TestTightenKeepsWhatIsLeftOut(t *testing.T) {
	p, err := Profile("default")
	if err != nil {
		t.Fatal(err)
	}
	same, err := Tighten(p, "empty", []byte("name: nothing"))
	if err != nil {
		t.Fatal(err)
	}
	if !Equal(same, p) {
		t.Error("a policy that says nothing changed something")
	}
	less, err := Tighten(p, "short", []byte("operations: {run_bash: never, web_search: always}"))
	if err != nil {
		t.Fatal(err)
	}
	if got := less.Level(nucleus.RunBash); got != Never {
		t.Errorf("run_bash is %v, want never", got)
	}
	if got, want := less.Level(nucleus.ReadFiles), p.Level(nucleus.ReadFiles); got != want {
		t.Errorf("read_files is %v, want %v as before", got, want)
	}
	if got, want := less.Level(nucleus.WebSearch), p.Level(nucleus.WebSearch); got != want {
		t.Errorf("web_search is %v, want %v: a repository must not loosen", got, want)
	}
}
