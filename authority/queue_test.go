package authority

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"cal/approval/client"
	"cal/nucleus"
)

// person is somebody at the screen of an authority that runs. What the queue wants done is
// done at once.
type person struct {
	t *testing.T
	b *bench
	q *queue
}

// between stands between queue and authority and may change what comes.
type between struct {
	*client.Client
	list    func([]client.Item)
	get     func(*nucleus.AskRequest)
	decided []string // ids, in order
}

func (b *between) List(ctx context.Context, state string) ([]client.Item, error) {
	items, err := b.Client.List(ctx, state)
	if b.list != nil {
		b.list(items)
	}
	return items, err
}

func (b *between) Get(ctx context.Context, id string) (nucleus.AskRequest, string, error) {
	ask, digest, err := b.Client.Get(ctx, id)
	if b.get != nil {
		b.get(&ask)
	}
	return ask, digest, err
}

func (b *between) Grant(ctx context.Context, id, token string) (client.Status, error) {
	b.decided = append(b.decided, id)
	return b.Client.Grant(ctx, id, token)
}

func (b *between) Deny(ctx context.Context, id string, d client.Denial) (client.Status, error) {
	b.decided = append(b.decided, id)
	return b.Client.Deny(ctx, id, d)
}

func newPerson(t *testing.T, width, height int) (*person, *between) {
	t.Helper()
	b := newBench(t, nil)
	way := &between{Client: b.client}
	key, err := ReadKey(b.cfg.Dir, "")
	if err != nil {
		t.Fatal(err)
	}
	p := &person{t, b, &queue{asks: way, sealed: key}}
	p.event(sizeEvent{width, height})
	return p, way
}

func (p *person) event(e any) {
	for do := p.q.update(p.b.c.now(), e); do != nil; {
		do = p.q.update(p.b.c.now(), do(p.t.Context()))
	}
}

// press types keys one by one, each alone; paste sends them at once.
func (p *person) press(keys ...string) {
	for _, k := range keys {
		p.paste(k)
	}
}

func (p *person) paste(keys ...string) { p.event(keyEvent{keys, p.b.c.now()}) }

func (p *person) list() { p.event(list(p.t.Context(), p.q.asks)) }

// read opens an ask and lets the time pass in which no key counts.
func (p *person) read(id string) {
	p.t.Helper()
	p.list()
	p.q.selected, p.q.open = id, nil
	p.press(keyEnter)
	if p.q.open == nil || p.q.open.ask.ID != id {
		p.t.Fatalf("ask %s was not opened: %s", id, p.screen())
	}
	p.b.c.advance(grace)
}

func (p *person) screen() string { return strings.Join(p.q.view().lines, "\n") + "\n" }

func (p *person) shows(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		if !strings.Contains(p.screen(), text) {
			p.t.Errorf("the screen has no %q:\n%s", text, p.screen())
		}
	}
}

func (p *person) ask(id string, change func(*nucleus.AskRequest)) nucleus.AskRequest {
	p.t.Helper()
	ask := askAt(p.t, p.b.c, id, change)
	if _, err := p.b.client.Submit(p.t.Context(), ask); err != nil {
		p.t.Fatal(err)
	}
	return ask
}

func (p *person) state(id, want string) client.Status {
	p.t.Helper()
	status, err := p.b.client.Status(p.t.Context(), id)
	if err != nil || status.State != want {
		p.t.Fatalf("ask %s: %+v, %v; want %s\n%s", id, status, err, want, p.screen())
	}
	return status
}

func chars(s string) []string { return strings.Split(s, "") }

// A person reads, and grants with the passphrase; denies with a reason and without it.
func TestQueue(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	p.list()
	p.shows("0 asks wait", "no ask waits")
	p.ask("a-1", nil)
	p.ask("a-2", func(a *nucleus.AskRequest) { a.Nonce = "n-2"; a.Action.Push.Ref = "refs/heads/other" })
	p.list()
	p.shows("2 asks wait", "> ", "git_push refs/heads/main to")
	p.press(keyEnter)
	p.shows("what will happen: git_push", "approval by ann  1 of 2: a-1", "read it: keys count in a moment")
	p.b.c.advance(grace)
	p.event(nil)
	p.press("g")
	p.shows("grants once: git_push refs/heads/main", "your phrase: blue lamp", "passphrase of ann: ")
	p.press(chars("wrong")...)
	if strings.Contains(p.screen(), "wrong") {
		t.Errorf("the passphrase stands on the screen:\n%s", p.screen())
	}
	p.press(keyEnter)
	p.shows("wrong passphrase", "passphrase of ann: ")
	p.state("a-1", client.Pending)
	p.press(chars(passphrase)...)
	p.press(keyEnter)
	p.state("a-1", client.Granted)
	p.shows("a-1 is granted once, until", "1 ask waits")

	p.read("a-2")
	p.press("d")
	p.press(chars("not \u202ethis")...)
	p.press(keyErase, "S", keyEnter)
	if got := p.state("a-2", client.Denied); got.Reason != "not \u202ethiS" {
		t.Errorf("reason %q", got.Reason)
	}
	p.shows("a-2 is denied", "no ask waits")
	if got := fmt.Sprint(way.decided); got != "[a-1 a-2]" {
		t.Errorf("decided %s", got)
	}
	p.press("q")
	if !p.q.leave {
		t.Error("q does not leave")
	}
}

// Ctrl-C leaves whatever else came with it and whatever is under way; of a line that is being
// typed it ends that alone.
func TestQueueInterrupted(t *testing.T) {
	p, _ := newPerson(t, 80, 24)
	p.ask("a-1", nil)
	p.read("a-1")
	p.press("d")
	p.press(keyInterrupt)
	if p.q.entry != nil || p.q.leave {
		t.Errorf("of a line: entry %v, left %v", p.q.entry, p.q.leave)
	}
	p.q.busy = "asking"
	p.press("q")
	if p.q.leave {
		t.Error("control: q leaves while something is under way")
	}
	p.paste("g", keyInterrupt)
	if !p.q.leave || !p.q.interrupted || p.q.entry != nil {
		t.Errorf("left %v, interrupted %v, entry %v", p.q.leave, p.q.interrupted, p.q.entry)
	}
}

// Keys that were typed before somebody could have read decide nothing.
func TestQueueTypedAhead(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	p.ask("a-1", nil)
	p.list()
	all := append(append([]string{"g"}, chars(passphrase)...), keyEnter)

	p.press(keyEnter)
	p.press(all...) // in no time
	p.state("a-1", client.Pending)
	p.b.c.advance(grace - time.Millisecond)
	p.read("a-1")
	p.b.c.advance(-time.Millisecond)
	p.press("g")
	p.press("d")
	if p.q.entry != nil {
		t.Errorf("a key counts %v after the ask came", grace-time.Millisecond)
	}
	p.b.c.advance(time.Millisecond)
	p.paste(all...) // in one piece
	p.paste(append([]string{"d"}, keyEnter)...)
	if p.q.entry != nil || len(way.decided) > 0 {
		t.Errorf("what came in one piece decides: %v", way.decided)
	}
	// A key that came while the ask was read, but was taken in later.
	p.event(keyEvent{[]string{"g"}, p.b.c.now().Add(-time.Millisecond)})
	if p.q.entry != nil {
		t.Error("a key counts by when it was taken in, not by when it came")
	}
	// Nothing counts while a decision is under way.
	p.q.busy = "opening the key"
	p.press("g", "q")
	if p.q.entry != nil || p.q.leave {
		t.Error("a key counts while something is under way")
	}
	p.q.busy = ""
	p.press("g") // the control
	if p.q.entry == nil {
		t.Fatalf("no key counts:\n%s", p.screen())
	}
	p.press(chars(passphrase)...)
	p.press(keyEnter)
	p.state("a-1", client.Granted)
}

// What will happen has to have been on the screen, to its last line.
func TestQueueUnread(t *testing.T) {
	p, _ := newPerson(t, 80, 24)
	p.ask("a-1", func(a *nucleus.AskRequest) {
		a.Action.Push.Ref = "refs/heads/" + strings.Repeat("x", 4000)
	})
	p.read("a-1")
	p.press("g")
	p.shows("lines of what will happen were not shown yet")
	if p.q.entry != nil {
		t.Fatal("granted unread")
	}
	p.press(keyEnd)
	p.press(keyHome)
	if p.q.unseen() == 0 {
		p.t.Fatal("the middle was not shown")
	}
	for range 10 {
		p.press(" ")
	}
	p.press("g")
	if p.q.entry == nil {
		t.Errorf("all was shown:\n%s", p.screen())
	}
	// Drawn anew it is unread again.
	p.press(keyEscape)
	p.event(sizeEvent{60, 20})
	if p.q.unseen() == 0 {
		t.Error("what was drawn anew counts as read")
	}
	p.event(sizeEvent{39, 24})
	p.press("g")
	p.event(sizeEvent{80, 11})
	p.press("g")
	if p.q.entry != nil {
		t.Error("granted on a terminal that is too small")
	}
}

// An ask that changes, expires or is decided elsewhere while it is shown cannot be granted.
func TestQueueChanges(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(*person, *between)
		says    string
		granted bool
	}{
		"nothing":                       {func(*person, *between) {}, "granted once", true},
		"the clock alone":               {func(p *person, _ *between) { p.b.c.advance(time.Minute); p.list() }, "granted once", true},
		"expires":                       {func(p *person, _ *between) { p.b.c.advance(301 * time.Second); p.event(nil) }, "it has expired", false},
		"expires, and the list says so": {func(p *person, _ *between) { p.b.c.advance(301 * time.Second); p.list() }, "waits no longer", false},
		"decided elsewhere": {func(p *person, _ *between) {
			_, digest, err := p.b.client.Get(p.t.Context(), "a-1")
			if err != nil {
				p.t.Fatal(err)
			}
			if _, err := p.b.client.Deny(p.t.Context(), "a-1", client.Denial{AskDigest: digest}); err != nil {
				p.t.Fatal(err)
			}
			p.list()
		}, "waits no longer", false},
		"another digest in the list": {func(p *person, way *between) {
			way.list = func(items []client.Item) { items[0].AskDigest = hexOf("other") }
			p.list()
		}, "keys count in a moment", false},
	} {
		t.Run(name, func(t *testing.T) {
			p, way := newPerson(t, 80, 24)
			p.ask("a-1", nil)
			p.read("a-1")
			p.press("g")
			p.press(chars(passphrase)...)
			c.happens(p, way)
			p.press(keyEnter)
			p.shows(c.says)
			if !c.granted && (p.q.entry != nil || len(way.decided) > 0) {
				t.Errorf("decided %v, still typing %v", way.decided, p.q.entry != nil)
			}
			if status, err := p.b.client.Status(t.Context(), "a-1"); err != nil || (status.State == client.Granted) != c.granted {
				t.Errorf("%+v, %v", status, err)
			}
		})
	}
}

// What is drawn is what the digest is of: another text for a known digest cannot be decided.
func TestQueueLies(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	p.ask("a-1", nil)
	way.get = func(a *nucleus.AskRequest) { a.Why = "nothing to see" }
	p.read("a-1")
	p.press("g")
	if p.q.entry != nil || p.q.open.closed == "" {
		t.Errorf("an ask that is not the one that was fetched can be granted:\n%s", p.screen())
	}
}

// Equal asks are granted together, each with a grant of its own; what differs in what
// is done, for whom or why is not equal.
func TestQueueEqual(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	again := func(salt byte) func(*nucleus.AskRequest) {
		return func(a *nucleus.AskRequest) { s := nucleus.Salt{salt}; a.Salt, a.Nonce = s[:], fmt.Sprint("n-", salt) }
	}
	p.ask("a-1", again(1))
	p.b.c.advance(time.Second)
	p.ask("a-2", again(2))
	p.ask("a-3", func(a *nucleus.AskRequest) {
		again(3)(a)
		a.Context.Spent.Tokens, a.Detail = 5, []nucleus.Detail{{Title: nucleus.DetailLately, Text: "x"}}
	})
	for i, change := range []func(*nucleus.AskRequest){
		func(a *nucleus.AskRequest) { a.Action.Push.New = "2" },
		func(a *nucleus.AskRequest) { a.Why = "another reason" },
		func(a *nucleus.AskRequest) { a.Context.Exposure = nucleus.Private },
		func(a *nucleus.AskRequest) { a.Session = "s-2" },
		func(a *nucleus.AskRequest) { a.Policy = hexOf("another") },
		func(a *nucleus.AskRequest) { a.Boot = "b-2" },
		func(a *nucleus.AskRequest) { a.Expires += 1000 },
		func(a *nucleus.AskRequest) { a.Detail = []nucleus.Detail{{Title: "diff", Text: "+ x"}} },
		func(a *nucleus.AskRequest) {
			a.Evidence = []nucleus.Evidence{{Seq: 7, Leg: "private", What: "read_files x"}}
		},
	} {
		p.ask(fmt.Sprint("a-other-", i), change)
	}
	p.read("a-2")
	p.shows("g grant  a all 3 equal  d deny")
	p.press("a")
	p.shows("grants 3 equal asks, each once: git_push")
	p.press(chars(passphrase)...)
	p.press(keyEnter)
	grants := map[string]bool{}
	for _, id := range []string{"a-1", "a-2", "a-3"} {
		grants[p.state(id, client.Granted).Grants[0].Grant] = true
	}
	if len(grants) != 3 || fmt.Sprint(way.decided) != "[a-2 a-1 a-3]" {
		t.Errorf("%d grants, decided %v", len(grants), way.decided)
	}
	for i := range 9 {
		p.state(fmt.Sprint("a-other-", i), client.Pending)
	}
	p.read("a-other-0")
	p.press("a")
	if p.q.entry != nil {
		t.Error("a batch of one")
	}
}

// An ask that needs several approvers waits on with the grant of one.
func TestQueueOfTwo(t *testing.T) {
	p, _ := newPerson(t, 80, 24)
	if _, err := p.b.addBy(t, newcomer{"bob", "red door", "another passphrase", "ann", passphrase}); err != nil {
		t.Fatal(err)
	}
	p.ask("a-1", func(a *nucleus.AskRequest) { a.Approvals = 2 })
	p.read("a-1")
	p.press("g")
	p.press(chars(passphrase)...)
	p.press(keyEnter)
	p.state("a-1", client.Pending)
	p.shows("a-1 has your grant; 1 more of 2 approvers", "1 of 2  git_push")
	var err error
	if p.q.sealed, err = ReadKey(p.b.cfg.Dir, "bob"); err != nil {
		t.Fatal(err)
	}
	p.read("a-1")
	p.press("g")
	p.shows("your phrase: red door", "passphrase of bob: ")
	p.press(chars("another passphrase")...)
	p.press(keyEnter)
	p.state("a-1", client.Granted)
}

// Going from ask to ask, each is fresh again.
func TestQueueNeighbours(t *testing.T) {
	p, _ := newPerson(t, 80, 24)
	for i := range 3 {
		p.ask(fmt.Sprint("a-", i), func(a *nucleus.AskRequest) { a.Action.Push.New = fmt.Sprint(i + 5) })
		p.b.c.advance(time.Second)
	}
	p.read("a-0")
	for _, step := range []struct{ key, at string }{{"n", "a-1"}, {"n", "a-2"}, {"n", "a-2"}, {"p", "a-1"}, {"p", "a-0"}, {"p", "a-0"}} {
		p.b.c.advance(grace)
		before := p.q.open.ask.ID
		p.press(step.key)
		if got := p.q.open.ask.ID; got != step.at {
			t.Errorf("%s leads to %s, want %s", step.key, got, step.at)
		}
		if p.q.open.ask.ID != before {
			if p.press("g"); p.q.entry != nil {
				t.Errorf("%s takes a key at once", step.at)
			}
		}
	}
}

func TestQueueGolden(t *testing.T) {
	for _, size := range []sizeEvent{{80, 24}, {40, 16}} {
		p, _ := newPerson(t, size.width, size.height)
		p.ask("a-1", nil)
		p.b.c.advance(12 * time.Second)
		p.ask("a-2", func(a *nucleus.AskRequest) { a.Action.Push.Ref = "refs/heads/\u202eniam" })
		p.b.c.advance(65 * time.Second)
		golden := func(name string) {
			t.Helper()
			path := filepath.Join("testdata", fmt.Sprintf("queue-%s-%d.txt", name, size.width))
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if err := os.WriteFile(path, []byte(p.screen()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			// Requests are signed anew for each run.
			if got := p.screen(); withoutHex(got) != withoutHex(string(want)) {
				t.Errorf("%s at %dx%d: got\n%s\nwant\n%s", name, size.width, size.height, got, want)
			}
		}
		p.list()
		golden("list")
		p.read("a-2")
		p.event(nil)
		for p.q.unseen() > 0 {
			p.press(keyDown)
		}
		golden("ask")
		p.press("g")
		golden("grant")
		p.press(keyEscape, "d")
		p.press(chars("later")...)
		golden("deny")
	}
}

func withoutHex(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'f' {
			return 'x'
		}
		return r
	}, s)
}

// Whatever is typed and whatever size the terminal has, a frame fits it and is printable
// ASCII, and no passphrase stands in it.
func TestQueueFrames(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	for i := range 4 {
		p.ask(fmt.Sprint("a-", i), func(a *nucleus.AskRequest) {
			a.Action.Push.Ref = strings.Repeat("\x1b[2J\u202e\n", 1+i*40)
			a.Why = "\x1b]0;x\x07\n\n"
		})
	}
	keys := []string{"g", "a", "d", "v", "n", "p", "j", "k", " ", "b", "x", "\u00e9", "\u202e", keyEnter, keyEscape, keyErase, keyKill, keyUp, keyDown, keyLeft, keyPageUp, keyPageDown, keyHome, keyEnd, keyOther, "secret"}
	rapid.Check(t, func(t *rapid.T) {
		p.q = &queue{asks: way, sealed: p.q.sealed}
		p.event(sizeEvent{80, 24})
		p.list()
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 6).Draw(t, "event") {
			case 0:
				p.event(sizeEvent{rapid.IntRange(0, 130).Draw(t, "width"), rapid.IntRange(0, 50).Draw(t, "height")})
			case 1:
				p.b.c.advance(time.Duration(rapid.IntRange(0, 900).Draw(t, "ms")) * time.Millisecond)
				p.list()
			default:
				k := rapid.SampledFrom(keys).Draw(t, "key")
				if k == "secret" && (p.q.entry == nil || !p.q.entry.grant) || k == keyEnter && p.q.entry != nil {
					continue // nothing is decided here
				}
				p.press(chars(k)[0:0]...)
				if k == "secret" {
					p.press(chars(k)...)
				} else {
					p.press(k)
				}
			}
			f := p.q.view()
			if len(f.lines) != p.q.height {
				t.Fatalf("%d lines on %d rows", len(f.lines), p.q.height)
			}
			for _, line := range f.lines {
				if len(line) > p.q.width || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' }) || strings.Contains(line, "secret") {
					t.Fatalf("line %q at width %d", line, p.q.width)
				}
			}
		}
	})
	if len(way.decided) > 0 {
		t.Errorf("decided %v", way.decided)
	}
}

func TestKeysIn(t *testing.T) {
	for raw, want := range map[string][]string{
		"g":             {"g"},
		"gy\r":          {"g", "y", keyEnter},
		"\x1b":          {keyEscape},
		"\x1b[A\x1b[6~": {keyUp, keyPageDown},
		"\x1bOB":        {keyDown},
		"\x1b[200~g\r":  {keyOther, "g", keyEnter},
		"\x1bg":         {keyOther},
		"\x1b[":         {keyOther},
		"\x1b[1;5":      {keyOther},
		"\u00e9\x7f":    {"\u00e9", keyErase},
		"\xff":          {"\xff"},
		"\x03\x15\x01":  {keyInterrupt, keyKill, keyOther},
	} {
		if got := keysIn([]byte(raw)); fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
			t.Errorf("%q: %q, want %q", raw, got, want)
		}
	}
}

// A frame of a full queue, drawn after each listing.
func BenchmarkQueueFrame(b *testing.B) {
	q := &queue{width: 120, height: 40}
	now := time.UnixMilli(1_700_000_000_000)
	var items []client.Item
	for i := range 1000 {
		items = append(items, client.Item{ID: fmt.Sprint("a-", i), Pod: "p-1", Op: nucleus.GitPush, Summary: strings.Repeat("x", 160), Need: 1, Created: now.UnixMilli(), Expires: now.UnixMilli() + 900_000})
	}
	for b.Loop() {
		q.update(now, listEvent{items: items})
		q.view().text(false)
	}
}

// Who types a passphrase looks at the keys. When its ask ends meanwhile, what is typed on is
// no command: it decides nothing, leaves nothing to the shell, and is dropped until Enter or Esc.
func TestQueueEndsWhileTyped(t *testing.T) {
	p, way := newPerson(t, 80, 24)
	p.ask("a-1", nil)
	p.b.c.advance(290 * time.Second)
	for _, id := range []string{"a-2", "a-3"} {
		p.ask(id, func(a *nucleus.AskRequest) { a.Nonce = "n-" + id; a.Action.Push.Ref = "refs/heads/" + id })
	}
	p.read("a-1")
	p.press("g")
	for i, k := range chars("nine quiet doors open") {
		p.press(k)
		p.b.c.advance(200 * time.Millisecond)
		if i == 2 {
			p.b.c.advance(10 * time.Second)
			p.list()
		}
		p.event(nil)
	}
	p.shows("nothing is decided: it", "what you type is dropped")
	if len(way.decided) > 0 || p.q.leave || p.q.open.ask.ID != "a-1" || len(p.q.entry.text) > 0 {
		t.Errorf("decided %v, left %v, at %s, kept %q", way.decided, p.q.leave, p.q.open.ask.ID, p.q.entry.text)
	}
	p.press(keyEnter)
	p.shows("Esc list")
	p.press("n") // control: a key is a command again
	p.shows("a-3, ")
}

// An authority that was put in another's place cannot steer the terminal by what it lists.
func TestQueueSummarySteers(t *testing.T) {
	p, way := newPerson(t, 120, 40)
	p.ask("a-1", nil)
	way.list = func(items []client.Item) { items[0].Summary = "\x1b[1;2r\x1b[?6h\u202e" }
	p.list()
	if screen := p.screen(); strings.ContainsAny(screen, "\x1b\u202e") || !strings.Contains(screen, `\u{1b}[1;2r`) {
		t.Errorf("the list holds what steers: %q", p.q.view().lines[1])
	}
}
