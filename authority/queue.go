package authority

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// A queue is the screen on which a person sees all that waits, and decides.
//
// The threat is a key that decides what nobody has read: one that was typed ahead, or for
// the ask before, or while the screen changed. So a fresh ask takes no deciding key for a
// while, only a key that came alone decides, what will happen must have been on the screen
// to its last line, and what is granted is the digest of the bytes that were drawn.
//
// Events change it in update alone, which does no I/O: what is to be done comes back as
// effects. view draws it. Neither waits, and the clock is handed in.
type queue struct {
	asks   asks
	sealed Key
	reason string // for grants; what a denial begins with

	width, height int
	now           time.Time

	items       []client.Item // that wait, oldest first
	failed      string        // why the list is not known
	selected    string        // id
	open        *opened       // the ask that is read; nil: the list is shown
	entry       *entry        // what is being typed
	busy        string        // what is under way; no key counts
	note        string        // what came of the last thing
	only        string        // the id of the one ask that the person came for; empty: all that waits
	granted     bool          // that one was granted
	leave       bool          // the person has left
	interrupted bool          // by Ctrl-C
	flush       bool          // what was typed up to now does not count
}

// asks is what the queue needs of the authority.
type asks interface {
	List(ctx context.Context, state string) ([]client.Item, error)
	Get(ctx context.Context, id string) (nucleus.AskRequest, string, error)
	Grant(ctx context.Context, id, token string) (client.Status, error)
	Deny(ctx context.Context, id string, d client.Denial) (client.Status, error)
}

// opened is an ask on the screen.
type opened struct {
	ask    nucleus.AskRequest
	digest string
	equal  []twin // other asks for the same
	whole  bool
	screen approval.Screen
	lines  []string
	action int    // the first line of what will happen
	top    int    // the first line that is shown
	seen   []bool // of lines
	fresh  time.Time
	closed string // why it can be decided no longer
}

// twin is an ask that is equal to another one.
type twin struct {
	ask    nucleus.AskRequest
	digest string
}

// entry is a line that is being typed.
type entry struct {
	grant bool // the passphrase; else the reason of a denial
	all   bool // for the equal asks too
	dead  bool // the ask has ended meanwhile: what is typed is dropped until it is ended
	text  []byte
}

// grace is how long a fresh ask takes no key that decides.
const grace = 700 * time.Millisecond

// The least terminal on which anything is decided.
const (
	leastWidth  = 40
	leastHeight = 12
)

// maxTwins is how many equal asks are granted at once.
const maxTwins = 20

// Events.
type (
	sizeEvent struct{ width, height int }
	listEvent struct {
		items []client.Item
		err   error
	}
	askEvent struct {
		id     string
		ask    nucleus.AskRequest
		digest string
		equal  []twin
		err    error
	}
	decidedEvent struct {
		said []string // a line for each ask
		err  error    // that ended it
	}
)

// effect is work for outside of update; what it returns is the next event.
type effect func(context.Context) any

// update takes an event in.
func (q *queue) update(now time.Time, event any) (do effect) {
	q.now = now
	defer q.look()
	switch e := event.(type) {
	case sizeEvent:
		q.width, q.height = e.width, e.height
		if q.open != nil {
			q.draw()
		}
	case listEvent:
		return q.listed(e)
	case askEvent:
		q.showAsk(e)
	case decidedEvent:
		return q.decided(e)
	case keyEvent:
		return q.keys(e)
	}
	q.expire()
	return nil
}

func (q *queue) listed(e listEvent) effect {
	if e.err != nil {
		q.failed = approval.Visible(e.err.Error())
		return nil
	}
	at := q.position()
	q.failed, q.items = "", e.items
	if q.position() < 0 {
		q.selected = ""
		if len(q.items) > 0 {
			q.selected = q.items[min(max(at, 0), len(q.items)-1)].ID
		}
	}
	if q.open == nil || q.busy != "" {
		return nil
	}
	i := slices.IndexFunc(q.items, func(i client.Item) bool { return i.ID == q.open.ask.ID })
	switch {
	case i < 0:
		q.close("it waits no longer: it was decided, or nobody asks any more")
	case q.items[i].AskDigest != q.open.digest:
		q.close("it has changed; it is read anew")
		return q.read(q.open.ask.ID)
	}
	q.expire()
	return nil
}

// close ends what is being typed for the ask on the screen and takes no more keys for it. Who
// types a passphrase looks at the keys: what they type on is swallowed until they end it.
func (q *queue) close(why string) {
	if q.open.closed == "" {
		q.open.closed = why
	}
	if q.entry != nil {
		clear(q.entry.text)
		q.entry = &entry{grant: q.entry.grant, dead: true}
	}
}

func (q *queue) expire() {
	if q.open != nil && q.now.UnixMilli() >= q.open.ask.Expires {
		q.close("it has expired")
	}
}

// forget clears what was typed.
func (q *queue) forget() {
	if q.entry != nil {
		clear(q.entry.text)
		q.entry = nil
	}
}

// position is that of the selected ask, or -1.
func (q *queue) position() int {
	return slices.IndexFunc(q.items, func(i client.Item) bool { return i.ID == q.selected })
}

// read gets an ask, and those of the list that ask for the same.
func (q *queue) read(id string) effect {
	q.busy = "reading " + approval.Visible(id)
	var alike []string
	if i := slices.IndexFunc(q.items, func(i client.Item) bool { return i.ID == id }); i >= 0 {
		for _, other := range q.items {
			if other.ID != id && other.Pod == q.items[i].Pod && other.Op == q.items[i].Op && other.Summary == q.items[i].Summary && len(alike) < maxTwins {
				alike = append(alike, other.ID)
			}
		}
	}
	return func(ctx context.Context) any {
		e := askEvent{id: id}
		if e.ask, e.digest, e.err = q.asks.Get(ctx, id); e.err == nil {
			e.err = approval.Check(e.ask)
		}
		for _, other := range alike {
			ask, digest, err := q.asks.Get(ctx, other)
			if err == nil && approval.Check(ask) == nil && equalAsks(e.ask, ask) {
				e.equal = append(e.equal, twin{ask, digest})
			}
		}
		return e
	}
}

// equalAsks reports whether who has read one ask has read the other: operation and resolved
// arguments, pod, session and policy, why it is asked, what is told beside, and how long it
// lives. They differ in ids, in when they were asked, in the requests that they came in, and
// in what the session did before.
func equalAsks(a, b nucleus.AskRequest) bool {
	bare := func(ask nucleus.AskRequest) string {
		ask.ID, ask.Nonce, ask.Digest, ask.Salt, ask.Request = "", "", "", nil, nil
		ask.Created, ask.Expires, ask.Context.UnixMilli = 0, ask.Expires-ask.Created, 0
		ask.Context.Spent, ask.Context.Reserved = nucleus.Amounts{}, nucleus.Amounts{}
		ask.Detail = slices.DeleteFunc(slices.Clone(ask.Detail), func(d nucleus.Detail) bool { return d.Title == nucleus.DetailLately })
		raw, err := nucleus.Canonical(ask)
		if err != nil {
			return ""
		}
		return string(raw)
	}
	one := bare(a)
	return one != "" && one == bare(b)
}

func (q *queue) showAsk(e askEvent) {
	q.busy = ""
	if e.err != nil {
		q.open, q.note = nil, approval.Visible(e.err.Error())
		q.leave = q.only != ""
		return
	}
	whole := false
	if q.open != nil && q.open.ask.ID == e.id {
		whole = q.open.whole
		if q.open.digest != e.digest {
			q.note = "this ask has changed since you read it"
		}
	}
	q.selected = e.id
	q.open = &opened{ask: e.ask, digest: e.digest, equal: e.equal, whole: whole, fresh: q.now.Add(grace)}
	q.flush = true
	q.draw()
}

// draw makes the lines of the ask anew. Nothing of them has been seen then.
func (q *queue) draw() {
	o := q.open
	screen, err := approval.Draw(o.ask, approval.View{Width: q.width, Whole: o.whole})
	if err == nil && screen.Digest != o.digest {
		err = fmt.Errorf("drawn from %s, fetched %s", screen.Digest, o.digest)
	}
	if err != nil {
		q.close(approval.Visible(err.Error()))
		o.lines, o.seen = nil, nil
		return
	}
	o.screen = screen
	o.lines = strings.Split(strings.TrimSuffix(screen.Text, "\n"), "\n")
	o.seen = make([]bool, len(o.lines))
	o.action = max(slices.IndexFunc(o.lines, func(l string) bool { return strings.HasPrefix(l, "what will happen: ") }), 0)
	q.scrollTo(o.action)
}

func (q *queue) scrollTo(line int) {
	q.open.top = max(min(line, len(q.open.lines)-q.room()), 0)
}

// look marks the lines that are on the screen.
func (q *queue) look() {
	o := q.open
	if o == nil || q.small() {
		return
	}
	o.top = max(min(o.top, len(o.lines)-q.room()), 0)
	for i := o.top; i < min(o.top+q.room(), len(o.lines)); i++ {
		o.seen[i] = true
	}
}

func (q *queue) small() bool { return q.width < leastWidth || q.height < leastHeight }

// unseen counts the lines of what will happen that have not been on the screen.
func (q *queue) unseen() (n int) {
	for _, seen := range q.open.seen[min(q.open.action, len(q.open.seen)):] {
		if !seen {
			n++
		}
	}
	return n
}

// undecidable says why no key decides now; empty where one does. at is when the key came.
func (q *queue) undecidable(at time.Time) string {
	switch o := q.open; {
	case q.small():
		return fmt.Sprintf("the terminal has %d columns and %d rows, %d and %d are needed", q.width, q.height, leastWidth, leastHeight)
	case o.closed != "":
		return o.closed
	case at.Before(o.fresh):
		return "read it: keys count in a moment"
	case q.unseen() > 0:
		return fmt.Sprintf("%d lines of what will happen were not shown yet (space)", q.unseen())
	}
	return ""
}

// keys takes what came from the terminal in one piece. Of several keys at once, pasted or
// typed ahead, none decides or begins a decision; while something is under way none counts
// but Ctrl-C.
func (q *queue) keys(e keyEvent) (do effect) {
	for _, k := range e.keys {
		switch {
		case k == keyInterrupt && q.entry == nil:
			q.leave, q.interrupted = true, true
		case do == nil && q.busy == "":
			do = q.key(k, len(e.keys) == 1, e.at)
		}
	}
	q.expire()
	return do
}

func (q *queue) key(k string, alone bool, at time.Time) effect {
	if q.entry != nil {
		return q.typed(k)
	}
	if k == "q" {
		q.leave = true
		return nil
	}
	if q.open == nil {
		return q.listKey(k)
	}
	return q.askKey(k, alone, at)
}

func (q *queue) listKey(k string) effect {
	at := q.position()
	move := func(to int) {
		if len(q.items) > 0 {
			q.selected = q.items[max(min(to, len(q.items)-1), 0)].ID
		}
	}
	switch k {
	case "j", "n", keyDown:
		move(at + 1)
	case "k", "p", keyUp:
		move(at - 1)
	case " ", keyPageDown:
		move(at + q.room())
	case "b", keyPageUp:
		move(at - q.room())
	case keyHome:
		move(0)
	case keyEnd:
		move(len(q.items) - 1)
	case keyEnter: // what came with it is dropped
		if at >= 0 {
			q.note = ""
			return q.read(q.selected)
		}
	}
	return nil
}

func (q *queue) askKey(k string, alone bool, at time.Time) effect {
	o := q.open
	step := max(q.room()-1, 1)
	switch k {
	case keyEscape, keyLeft:
		q.open, q.leave = nil, q.only != ""
	case "j", keyDown:
		q.scrollTo(o.top + 1)
	case "k", keyUp:
		q.scrollTo(o.top - 1)
	case " ", keyPageDown:
		q.scrollTo(o.top + step)
	case "b", keyPageUp:
		q.scrollTo(o.top - step)
	case keyHome:
		q.scrollTo(0)
	case keyEnd:
		q.scrollTo(len(o.lines))
	case "v":
		o.whole = !o.whole
		q.draw()
	case "n", "p":
		if q.only != "" {
			return nil
		}
		return q.neighbour(k == "n")
	case "g", "a", "d":
		if k == "a" && len(o.equal) == 0 || !alone {
			return nil
		}
		if q.undecidable(at) != "" {
			return nil // the screen says why
		}
		q.note = ""
		q.entry, q.flush = &entry{grant: k != "d", all: k == "a"}, true
		q.scrollTo(o.action)
		if k == "d" {
			q.entry.text = []byte(q.reason)
		}
	}
	return nil
}

// neighbour opens the ask after or before the one on the screen.
func (q *queue) neighbour(next bool) effect {
	at := q.position()
	to := at - 1
	if next {
		to = at + 1
	}
	if at < 0 || to < 0 || to >= len(q.items) {
		q.note = "there is no other in this direction"
		return nil
	}
	q.note = ""
	return q.read(q.items[to].ID)
}

// typed takes a key of a line that is being typed.
func (q *queue) typed(k string) effect {
	e := q.entry
	if e.dead {
		if k == keyEnter || k == keyEscape || k == keyInterrupt {
			q.forget()
		}
		return nil
	}
	switch k {
	case keyEscape, keyInterrupt:
		q.forget()
	case keyEnter:
		if e.grant && len(e.text) == 0 {
			return nil
		}
		return q.decide()
	case keyErase:
		if _, size := utf8.DecodeLastRune(e.text); size > 0 {
			clear(e.text[len(e.text)-size:])
			e.text = e.text[:len(e.text)-size]
		}
	case keyKill:
		clear(e.text)
		e.text = e.text[:0]
	default:
		if r, size := utf8.DecodeRuneInString(k); size == len(k) && r >= ' ' && r != 0x7f && len(e.text)+size <= maxLine {
			if len(e.text)+size > cap(e.text) { // a passphrase is not left behind where it was
				grown := append(make([]byte, 0, 2*cap(e.text)+64), e.text...)
				clear(e.text)
				e.text = grown
			}
			e.text = append(e.text, k...)
		}
	}
	return nil
}

// decide hands the decision in. Of equal asks each gets one of its own.
func (q *queue) decide() effect {
	o, e := q.open, q.entry
	these := []twin{{o.ask, o.digest}}
	if e.all {
		these = append(these, o.equal...)
	}
	typed := string(e.text)
	clear(e.text)
	e.text = e.text[:0]
	each := func(ctx context.Context, decide func(context.Context, twin) (client.Status, error)) (out decidedEvent) {
		for _, this := range these {
			status, err := decide(ctx, this)
			if err != nil {
				out.err = err
				return out
			}
			out.said = append(out.said, said(status, this.ask))
		}
		return out
	}
	if !e.grant {
		q.busy = "denying"
		return func(ctx context.Context) any {
			return each(ctx, func(ctx context.Context, this twin) (client.Status, error) {
				return q.asks.Deny(ctx, this.ask.ID, client.Denial{Approver: q.sealed.Approver, AskDigest: this.digest, Reason: strings.TrimSpace(typed)})
			})
		}
	}
	q.busy = "opening the key"
	return func(ctx context.Context) any {
		signer, err := q.sealed.Open(typed)
		if err != nil {
			return decidedEvent{err: err}
		}
		defer signer.Close()
		return each(ctx, func(ctx context.Context, this twin) (client.Status, error) {
			token, err := signer.Grant(this.ask, nil, q.reason)
			if err != nil {
				return client.Status{}, err
			}
			return q.asks.Grant(ctx, this.ask.ID, token)
		})
	}
}

// said is what came of a decision, in a line.
func said(status client.Status, ask nucleus.AskRequest) string {
	id, until := approval.Visible(ask.ID), time.UnixMilli(ask.Expires).UTC().Format("15:04:05 MST")
	more := status.Need - len(status.Grants)
	switch {
	case status.State == client.Denied:
		return id + " is denied"
	case more > 0:
		return fmt.Sprintf("%s has your grant; %d more of %d approvers have to grant it by %s", id, more, status.Need, until)
	case ask.Passage != nil:
		return id + " is granted; to be used by " + until + ", and stands from then on as shown"
	}
	return id + " is granted once, until " + until
}

func (q *queue) decided(e decidedEvent) effect {
	q.busy, q.flush = "", true
	q.note = strings.Join(e.said, "; ")
	var refusal *nucleus.Error
	switch {
	case e.err == nil:
		q.granted = q.entry != nil && q.entry.grant
		q.forget()
		q.open, q.leave = nil, q.only != ""
	case errors.As(e.err, &refusal) && refusal.Kind == nucleus.KindForbidden && q.entry != nil && q.open.closed == "":
		q.note = strings.TrimPrefix(q.note+"; "+approval.Visible(refusal.Message), "; ") // typed again
	default:
		q.forget()
		q.note = strings.TrimPrefix(q.note+"; "+approval.Visible(e.err.Error()), "; ")
		q.open.fresh = q.now.Add(grace)
	}
	return func(ctx context.Context) any { return list(ctx, q.asks) }
}

func list(ctx context.Context, from asks) listEvent {
	items, err := from.List(ctx, client.Pending)
	return listEvent{items, err}
}
