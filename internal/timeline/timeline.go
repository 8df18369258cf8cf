// Package timeline tells a person what the log holds of a session: an entry in a line,
// and a whole session as a page.
//
// Claim: the page shows what a verified receipt proves and nothing else. Threat: every
// text in the log may be written by an agent or by those who wrote to it, in order to run
// a script in the reader's browser, to fetch something, or to be read as something else.
// Promise: the page is one file that loads nothing and runs one script, whose hash its
// content security policy names; text of the log is data in it, in printable ASCII.
package timeline

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"strings"
	"time"

	"cal/approval"
	"cal/audit"
	"cal/nucleus"
)

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

//go:embed page.js
var pageJS string

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// maxEntries bounds a page, which has 40 MB then, and 3 KB in memory for each.
const maxEntries = 100_000

// Write writes the page of a session. r is what VerifyReceipt returned.
func Write(w io.Writer, r *audit.Receipt) error {
	if r.Session == "" {
		return fmt.Errorf("a proof of one entry is no session")
	}
	if n := len(r.Entries); n > maxEntries {
		return fmt.Errorf("session %s has %d entries, a page shows at most %d (cal audit verify-receipt --entries lists them)", approval.Visible(r.Session), n, maxEntries)
	}
	p, err := newPage(r)
	if err != nil {
		return err
	}
	return pageTemplate.Execute(w, p)
}

// page is what the template draws. Every text in it is visible ASCII.
type page struct {
	CSS    template.CSS
	JS     template.JS
	Policy string // the content security policy

	Title, Session, When, Took string
	Facts                      []fact
	Refusals                   []row
	Groups                     []group
	Ticks                      []tick
	Breaks                     []tick
	Lines                      []tick // over all lanes
	Rows                       []row
	Kinds                      []string // groups of rows that there are
	Checkpoint                 []noteLine
	Says                       []string
}

// noteLine is a line of a signed note: one of a signature begins with a dash and a space.
type noteLine struct {
	Signs bool
	Text  string
}

func noteLines(signed string) (lines []noteLine) {
	for line := range strings.Lines(signed) {
		text, signs := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "\u2014 ")
		lines = append(lines, noteLine{signs, approval.Visible(text)})
	}
	return lines
}

// fact is one of the things to know first. Tone is a class: good, warn, bad or none.
type fact struct{ Name, Value, Tone string }

// tick is a place on the time axis, in percent.
type tick struct {
	At, Width, Text, Tone string
}

// row is one entry of the list.
type row struct {
	Seq                                                            int64
	At, Time, Kind, Op, What, Verdict, Rule, Status, Tone, Group   string
	Actor, Permit, Ask, Grants, Exposure, Message, Spent, Duration string
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func newPage(r *audit.Receipt) (*page, error) {
	s, err := newStory(r)
	if err != nil {
		return nil, err
	}
	p := &page{
		CSS: template.CSS(pageCSS), JS: template.JS(pageJS), // this program's own text
		Policy:     fmt.Sprintf("default-src 'none'; script-src %s; style-src %s; base-uri 'none'; form-action 'none'", hash(pageJS), hash(pageCSS)),
		Session:    approval.Visible(r.Session),
		When:       s.start.Format("2 January 2006, 15:04:05 UTC"),
		Took:       span(s.end.Sub(s.start)),
		Checkpoint: noteLines(r.Checkpoint),
		Says:       r.Says(),
	}
	p.Title = s.title()
	p.Rows = s.rows
	p.Refusals = s.refusals()
	p.Facts = s.facts()
	p.Groups = s.groups()
	p.Ticks, p.Breaks = s.scale.ticks(s.start), s.scale.gaps()
	p.Lines = s.lines()
	p.Kinds = s.kinds()
	return p, nil
}

// event is an entry as it is drawn.
type event struct {
	nucleus.Entry
	x      extra
	at     time.Time
	action nucleus.Action
	row    *row
}

// story is a session in the order of its entries.
type story struct {
	receipt    *audit.Receipt
	events     []event
	rows       []row
	start, end time.Time
	scale      scale
	outcomes   map[string]*event // by permit
	asks       map[string]*event // by ask
}

func newStory(r *audit.Receipt) (*story, error) {
	s := &story{receipt: r, outcomes: map[string]*event{}, asks: map[string]*event{}, events: make([]event, len(r.Entries)), rows: make([]row, len(r.Entries))}
	times := make([]time.Time, len(r.Entries))
	for i, raw := range r.Entries {
		e, err := audit.ParseEntry(raw)
		if err != nil {
			return nil, err
		}
		at, err := time.Parse(time.RFC3339Nano, e.Time)
		if err != nil {
			return nil, fmt.Errorf("entry %d: time %q: %w", e.Seq, e.Time, err)
		}
		v := &s.events[i]
		*v = event{Entry: e, x: extraOf(e), at: at}
		if json.Unmarshal(e.Args, &v.action) != nil {
			v.action = nucleus.Action{} // arguments as they came, which stood for nothing
		}
		switch e.Kind {
		case nucleus.KindOutcome:
			s.outcomes[e.Permit] = v
		case nucleus.KindApprovalAsk:
			s.asks[e.Ask] = v
		}
		times[i] = at
	}
	s.start, s.end = times[0], times[0]
	for _, at := range times { // a clock may have been set back
		if at.Before(s.start) {
			s.start = at
		}
		if at.After(s.end) {
			s.end = at
		}
	}
	s.scale = newScale(times)
	for i := range s.events {
		s.rows[i] = s.row(&s.events[i])
		s.events[i].row = &s.rows[i]
	}
	return s, nil
}

// refused reports whether an entry says that something was not allowed to happen, or to go
// on.
func refused(e nucleus.Entry) bool {
	return e.Verdict == nucleus.Deny || e.Status == nucleus.OutcomeRefused || e.Kind == nucleus.KindSessionRefuse || e.Kind == nucleus.KindSessionBudget
}

// tone is the class of an entry.
func tone(e nucleus.Entry) string {
	switch {
	case refused(e):
		return "bad"
	case e.Kind == nucleus.KindIntent && e.Verdict == nucleus.Ask && e.Permit != "":
		return "good" // it had its grant
	case e.Verdict == nucleus.Ask || e.Kind == nucleus.KindApprovalAsk || e.Status == nucleus.OutcomeFailed || e.Status == nucleus.OutcomeUnknown || e.Kind == nucleus.KindPodFail || e.Kind == nucleus.KindLogTorn:
		return "warn"
	case e.Kind == nucleus.KindApprovalUse:
		return "good"
	}
	return ""
}

// groupOf is the group of lanes, and of the list's filter, that an entry belongs to.
func groupOf(e nucleus.Entry) string {
	switch e.Op {
	case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch:
		return "files"
	case nucleus.RunBash:
		return "commands"
	case nucleus.WebFetch, nucleus.NetConnect, nucleus.WebSearch:
		return "network"
	case nucleus.GitCommit, nucleus.GitPush, nucleus.CreatePR:
		return "git"
	case nucleus.SpawnAgent, nucleus.ManagePods:
		return "pods"
	}
	if e.Kind == nucleus.KindModelCall {
		return "model"
	}
	return "session"
}

func (s *story) row(v *event) row {
	e := v.Entry
	r := row{
		Seq: e.Seq, At: since(v.at.Sub(s.start)), Time: approval.Visible(e.Time), Kind: approval.Visible(e.Kind), Op: approval.Visible(string(e.Op)), What: What(e),
		Verdict: approval.Visible(string(e.Verdict)), Rule: approval.Visible(e.Rule), Status: approval.Visible(e.Status), Tone: tone(e), Group: groupOf(e),
		Actor: approval.Visible(e.Actor), Permit: approval.Visible(e.Permit), Ask: approval.Visible(e.Ask), Message: short(approval.Visible(v.x.Message)),
	}
	if ask := s.asks[e.Ask]; ask != nil && len(e.Args) == 0 {
		r.Message = short(approval.Visible(v.x.Reason))
		r.What = What(ask.Entry)
	}
	for _, grant := range e.Grants {
		r.Grants += approval.Visible(grant) + " "
	}
	for _, leg := range e.Exposure {
		r.Exposure += approval.Visible(leg) + " "
	}
	if e.Kind == nucleus.KindOutcome && e.Outcome != nil {
		var o nucleus.Outcome
		if json.Unmarshal(e.Outcome.Payload, &o) == nil {
			r.Duration = round(time.Duration(o.Millis) * time.Millisecond)
			if o.ExitCode != 0 {
				r.What = fmt.Sprintf("exit code %d", o.ExitCode)
			}
		}
	}
	return r
}

// since is an offset from the start to the millisecond.
func since(d time.Duration) string {
	d = d.Round(time.Millisecond)
	switch seconds := d.Seconds(); {
	case d < time.Minute:
		return fmt.Sprintf("+%.3f s", seconds)
	case d < time.Hour:
		return fmt.Sprintf("+%d:%06.3f", int(d.Minutes()), (d % time.Minute).Seconds())
	}
	return fmt.Sprintf("+%d:%02d:%06.3f", int(d.Hours()), int(d.Minutes())%60, (d % time.Minute).Seconds())
}

// span is how long something took, as people say it.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
}
