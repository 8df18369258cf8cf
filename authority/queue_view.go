package authority

import (
	"fmt"
	"strings"
	"time"

	"cal/approval"
	"cal/approval/client"
)

// frame is what stands on the terminal: as many lines as it has rows, none longer than its
// columns, all printable ASCII. Cursor is where a line is typed; row -1 shows none.
type frame struct {
	lines    []string
	strong   map[int]bool // lines that stand out
	row, col int
}

// panel is how many rows what is typed takes, keys and notes how many stand below the text.
const (
	panelRows  = 4
	footerRows = 2
)

// room is how many rows there are for the list, or for the text of an ask.
func (q *queue) room() int {
	rows := q.height - 1 - footerRows
	if q.entry != nil {
		rows -= panelRows
	}
	return max(rows, 1)
}

func (q *queue) view() frame {
	f := frame{strong: map[int]bool{0: true}, row: -1}
	add := func(text string) { f.lines = append(f.lines, fit(approval.Plain(text), q.width)) } // whoever wrote it
	switch {
	case q.small():
		add(fmt.Sprintf("%dx%d: %dx%d is needed (q)", q.width, q.height, leastWidth, leastHeight))
	case q.open == nil:
		q.viewList(&f, add)
	default:
		q.viewAsk(&f, add)
	}
	for len(f.lines) < q.height {
		add("")
	}
	f.lines = f.lines[:max(q.height, 0)]
	return f
}

func (q *queue) viewList(f *frame, add func(string)) {
	add(spread("approvals by "+q.sealed.Approver, waiting(len(q.items)), q.width))
	at, room := q.position(), q.room()
	top := max(min(at-room/2, len(q.items)-room), 0)
	for i := top; i < min(top+room, len(q.items)); i++ {
		if i == at {
			f.strong[len(f.lines)] = true
		}
		add(q.row(q.items[i], i == at))
	}
	if len(q.items) == 0 && q.failed == "" {
		add("")
		add("  no ask waits; new ones appear here")
	}
	for len(f.lines) < q.height-footerRows {
		add("")
	}
	add(q.status(""))
	add("Enter reads  j k move  q leaves")
}

func waiting(n int) string {
	if n == 1 {
		return "1 ask waits"
	}
	return fmt.Sprintf("%d asks wait", n)
}

// row is one ask of the list: its age, the time that is left, what it is for, and how many of
// the approvers that it needs have granted it.
func (q *queue) row(i client.Item, selected bool) string {
	mark := "  "
	if selected {
		mark = "> "
	}
	pod := ""
	if q.width >= 70 {
		pod = fmt.Sprintf("  %-12s", approval.Visible(i.Pod))
	}
	of := ""
	if i.Need > 1 {
		of = fmt.Sprintf("%d of %d  ", len(i.Granted), i.Need)
	}
	age, left := q.now.Sub(time.UnixMilli(i.Created)), time.UnixMilli(i.Expires).Sub(q.now)
	return fmt.Sprintf("%s%6s old %6s left%s  %s%s", mark, minutes(age), minutes(left), pod, of, i.Summary)
}

// minutes is a time as minutes and seconds.
func minutes(d time.Duration) string {
	seconds := max(int64(d/time.Second), 0)
	if seconds >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", seconds/3600, seconds/60%60, seconds%60)
	}
	return fmt.Sprintf("%d:%02d", seconds/60, seconds%60)
}

func (q *queue) viewAsk(f *frame, add func(string)) {
	o := q.open
	left := minutes(time.UnixMilli(o.ask.Expires).Sub(q.now)) + " left"
	if o.closed != "" {
		left = "closed"
	}
	title := fmt.Sprintf("%s, %s old", approval.Visible(o.ask.ID), minutes(q.now.Sub(time.UnixMilli(o.ask.Created))))
	if at := q.position(); at >= 0 && q.width >= 70 {
		title = fmt.Sprintf("approval by %s  %d of %d: %s", q.sealed.Approver, at+1, len(q.items), title)
	}
	add(spread(title, left, q.width))
	for i := range q.room() {
		line := ""
		if o.top+i < len(o.lines) {
			line = o.lines[o.top+i]
		}
		add(line)
	}
	if q.entry != nil {
		q.viewEntry(f, add)
	}
	place := fmt.Sprintf("lines %d-%d of %d", min(o.top+1, len(o.lines)), min(o.top+q.room(), len(o.lines)), len(o.lines))
	if o.screen.Cut {
		place += ", parts cut: v"
	}
	if o.closed == "" && q.entry == nil {
		if why := q.undecidable(q.now); why != "" {
			place = why
		}
	}
	add(q.status(place))
	switch {
	case q.entry != nil && q.entry.dead:
		add("Enter or Esc goes on")
	case q.entry != nil && q.entry.grant:
		add("Enter grants  Esc back")
	case q.entry != nil:
		add("Enter denies  Esc back")
	case o.closed != "":
		add(q.keysShown("Esc list  n p other asks  q leaves", "q leaves"))
	default:
		keys := "g grant  d deny"
		if len(o.equal) > 0 {
			keys = fmt.Sprintf("g grant  a all %d equal  d deny", len(o.equal)+1)
		}
		add(keys + q.keysShown("  v whole  n p  Esc list  q", "  v whole  q leaves"))
	}
}

// keysShown chooses between the keys that lead to other asks and those that do not.
func (q *queue) keysShown(all, only string) string {
	if q.only != "" {
		return only
	}
	return all
}

// viewEntry is where something is typed: what it decides, and for the passphrase the person's
// own phrase.
func (q *queue) viewEntry(f *frame, add func(string)) {
	o, e := q.open, q.entry
	add(strings.Repeat("-", q.width))
	prompt := "reason (the agent is told): "
	switch {
	case e.dead:
		add("nothing is decided: " + o.closed)
		add("")
		add("what you type is dropped; Enter or Esc goes on")
	case !e.grant:
		add("denies " + approval.Summary(o.ask))
		add("")
		add(prompt + approval.Visible(string(e.text)))
	default:
		what := "grants once: "
		if o.ask.Passage != nil {
			what = "opens this passage: "
		}
		if e.all {
			what = fmt.Sprintf("grants %d equal asks, each once: ", len(o.equal)+1)
		}
		add(what + approval.Summary(o.ask))
		add("your phrase: " + approval.Visible(q.sealed.Phrase))
		prompt = "passphrase of " + q.sealed.Approver + ": "
		add(prompt)
	}
	f.row, f.col = len(f.lines)-1, min(len(prompt), q.width-1)
	if !e.grant {
		f.col = min(len(prompt)+len(approval.Visible(string(e.text))), q.width-1)
	}
}

// status is the line above the keys.
func (q *queue) status(place string) string {
	switch {
	case q.busy != "":
		return q.busy + " ..."
	case q.failed != "":
		return q.failed
	case q.open != nil && q.open.closed != "":
		return q.open.closed
	case q.note != "":
		return q.note
	}
	return place
}

// spread puts one text at the left and one at the right edge.
func spread(left, right string, width int) string {
	left = fit(left, max(width-len(right)-1, 0))
	return left + strings.Repeat(" ", max(width-len(left)-len(right), 1)) + right
}

// fit cuts a line of ASCII visibly.
func fit(text string, width int) string {
	switch {
	case len(text) <= width:
		return text
	case width < 3:
		return text[:max(width, 0)]
	}
	return text[:width-3] + "..."
}
