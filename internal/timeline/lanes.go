package timeline

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// group is lanes of one subject, and charts below them.
type group struct {
	Name   string
	Class  string // of its marks
	Lanes  []lane
	Charts []chart
}

type lane struct {
	Label, Title string
	Marks        []mark
}

// mark is an entry on a lane: a bar, or where it has no length a point.
type mark struct {
	Seq     int64
	X, W    string // percent
	Diamond bool
	Tone    string // a class; "hollow" is one that changed nothing
	Title   string

	x float64
}

// chart is a line over time.
type chart struct {
	Label, Value, Tone string
	Path               string // steps in 1000 by 100
}

// maxLanes bounds the lanes of a group; what is rarer shares one.
const maxLanes = 8

func (s *story) mark(v *event, until time.Time, class string) mark {
	x := s.scale.at(v.at)
	m := mark{Seq: v.Seq, X: percent(x), W: width(s.scale.at(until) - x), Tone: class, x: x}
	m.Title = strings.Join(filled(fmt.Sprintf("entry %d, %s", v.Seq, v.row.At), v.row.Kind, v.row.Op, v.row.What, v.row.Verdict, v.row.Rule, v.row.Status), " | ")
	return m
}

// width is that of a bar, which is seen however short.
func width(x float64) string { return percent(max(x, 0.1)) }

// named collects marks by the name of their lane.
type named struct {
	names []string // in the order in which they came
	marks map[string][]mark
}

func (n *named) add(name string, m mark) {
	if n.marks == nil {
		n.marks = map[string][]mark{}
	}
	if _, ok := n.marks[name]; !ok {
		n.names = append(n.names, name)
	}
	n.marks[name] = append(n.marks[name], m)
}

// lanes are the names with the most marks, and one lane for the others.
func (n *named) lanes() (list []lane) {
	often := slices.Clone(n.names)
	slices.SortStableFunc(often, func(a, b string) int { return cmp.Compare(len(n.marks[b]), len(n.marks[a])) })
	if len(often) > maxLanes {
		often = often[:maxLanes-1]
	}
	var rest []mark
	others := 0
	for _, name := range n.names {
		if slices.Contains(often, name) {
			list = append(list, lane{end(name), name, n.marks[name]})
			continue
		}
		others++
		rest = append(rest, n.marks[name]...)
	}
	if others > 0 {
		slices.SortStableFunc(rest, func(a, b mark) int { return cmp.Compare(a.x, b.x) })
		name := fmt.Sprintf("%d others", others)
		list = append(list, lane{name, name, rest})
	}
	return list
}

func (s *story) groups() (list []group) {
	for _, g := range []group{
		{Name: "Refused", Class: "refused", Lanes: s.refusedLane()},
		{Name: "Approvals", Class: "approvals", Lanes: s.approvalLanes()},
		{Name: "Exposure", Class: "exposure", Lanes: s.exposureLanes()},
		{Name: "Session", Class: "session", Lanes: s.sessionLanes()},
		{Name: "Model", Class: "model", Lanes: s.modelLanes()},
		{Name: "Files", Class: "files", Lanes: s.callLanes("files", filesOf)},
		{Name: "Commands", Class: "commands", Lanes: s.callLanes("commands", programOf)},
		{Name: "Network", Class: "network", Lanes: s.networkLanes()},
		{Name: "Git", Class: "git", Lanes: s.callLanes("git", opOf)},
		{Name: "Sub-pods", Class: "pods", Lanes: s.callLanes("pods", opOf)},
		{Name: "Budget", Class: "budget", Charts: s.charts()},
	} {
		if len(g.Lanes)+len(g.Charts) > 0 {
			list = append(list, g)
		}
	}
	return list
}

func oneLane(label string, marks []mark) []lane {
	if len(marks) == 0 {
		return nil
	}
	return []lane{{label, label, marks}}
}

func (s *story) refusedLane() []lane {
	var marks []mark
	for i := range s.events {
		if v := &s.events[i]; refused(v.Entry) {
			m := s.mark(v, v.at, "bad")
			m.Diamond = true
			marks = append(marks, m)
		}
	}
	return oneLane("refused", marks)
}

func (s *story) approvalLanes() []lane {
	answers := map[string]*event{}
	for i := range s.events {
		if v := &s.events[i]; v.Kind == nucleus.KindApprovalUse || v.Kind == nucleus.KindApprovalDeny {
			if _, ok := answers[v.Ask]; !ok {
				answers[v.Ask] = v
			}
		}
	}
	var n named
	for i := range s.events {
		v := &s.events[i]
		if v.Kind != nucleus.KindApprovalAsk {
			continue
		}
		until, class := s.end, "warn"
		if answer := answers[v.Ask]; answer != nil {
			until, class = answer.at, "good"
			if answer.Kind == nucleus.KindApprovalDeny {
				class = "bad"
			}
		}
		n.add(v.row.Op, s.mark(v, until, class))
	}
	return n.lanes()
}

// legs are the three of the trifecta, and the entry that took each first.
func (s *story) legs() (taken map[string]*event) {
	taken = map[string]*event{}
	for i := range s.events {
		for _, leg := range s.events[i].Exposure {
			if taken[leg] == nil {
				taken[leg] = &s.events[i]
			}
		}
	}
	return taken
}

func (s *story) exposureLanes() (lanes []lane) {
	taken := s.legs()
	for _, leg := range []struct{ name, label string }{{"private", "private data"}, {"untrusted", "untrusted content"}, {"way_out", "a way out"}} {
		l := lane{Label: leg.label, Title: leg.label}
		if v := taken[leg.name]; v != nil {
			l.Marks = []mark{s.mark(v, s.end, leg.name)}
		}
		lanes = append(lanes, l)
	}
	return lanes
}

// met is the entry by which private data and untrusted content have met.
func (s *story) met() *event {
	taken := s.legs()
	a, b := taken["private"], taken["untrusted"]
	switch {
	case a == nil || b == nil:
		return nil
	case a.Seq > b.Seq:
		return a
	}
	return b
}

func (s *story) sessionLanes() []lane {
	n := named{names: []string{"machine", "agent"}, marks: map[string][]mark{"machine": nil, "agent": nil}}
	var agents, pods []*event
	closes := func(list []*event, v *event) *event {
		for _, open := range list {
			if open.Pod == v.Pod {
				return open
			}
		}
		return nil
	}
	bar := func(label string, from, to *event) {
		until := s.end
		if to != nil {
			until = to.at
		}
		n.add(label, s.mark(from, until, "hollow"))
	}
	for i := range s.events {
		v := &s.events[i]
		switch v.Kind {
		case nucleus.KindPodCreate, nucleus.KindPodAdopt:
			if closes(pods, v) == nil {
				pods = append(pods, v)
			}
		case nucleus.KindPodStop, nucleus.KindPodFail:
			if open := closes(pods, v); open != nil {
				bar("machine", open, v)
				pods = slices.DeleteFunc(pods, func(o *event) bool { return o == open })
			}
		case nucleus.KindSessionStart:
			agents = append(agents, v)
		case nucleus.KindSessionEnd, nucleus.KindSessionRefuse:
			if open := closes(agents, v); open != nil {
				bar("agent", open, v)
				agents = slices.DeleteFunc(agents, func(o *event) bool { return o == open })
			}
		case nucleus.KindIntent, nucleus.KindOutcome, nucleus.KindModelCall, nucleus.KindEgressOpen, nucleus.KindEgressClose, nucleus.KindPodStart,
			nucleus.KindApprovalAsk, nucleus.KindApprovalUse, nucleus.KindApprovalDeny:
		default:
			n.add("other", s.mark(v, v.at, v.row.Tone))
		}
	}
	for _, open := range pods {
		bar("machine", open, nil)
	}
	for _, open := range agents {
		bar("agent", open, nil)
	}
	return slices.DeleteFunc(n.lanes(), func(l lane) bool { return len(l.Marks) == 0 })
}

func (s *story) modelLanes() []lane {
	begun := map[string]*event{}
	var n named
	for i := range s.events {
		v := &s.events[i]
		switch {
		case v.Kind != nucleus.KindModelCall:
		case refused(v.Entry):
			n.add("refused", s.mark(v, v.at, "bad"))
		case !v.x.Done:
			begun[v.x.ID] = v
		default:
			name := cmp.Or(approval.Visible(v.x.Model), "model")
			from := v
			if open := begun[v.x.ID]; open != nil {
				from = open
				delete(begun, v.x.ID)
			}
			m := s.mark(v, v.at, v.row.Tone)
			x := s.scale.at(from.at)
			m.x, m.X, m.W = x, percent(x), width(s.scale.at(v.at)-x)
			if v.x.Status >= 400 {
				m.Tone = "warn"
			}
			n.add(name, m)
		}
	}
	for _, v := range begun { // nothing came of them
		n.add("no answer", s.mark(v, s.end, "warn"))
	}
	return n.lanes()
}

// callLanes are the requests of a group, each from its intent to its outcome, in the
// lanes that names gives.
func (s *story) callLanes(class string, names func(*event) []string) []lane {
	var n named
	for i := range s.events {
		v := &s.events[i]
		if v.Kind != nucleus.KindIntent || groupOf(v.Entry) != class {
			continue
		}
		until, mood := v.at, v.row.Tone
		if o := s.outcomes[v.Permit]; v.Permit != "" && o != nil {
			until = o.at
			if mood == "" {
				mood = o.row.Tone
			}
			if mood == "" && strings.HasPrefix(o.row.What, "exit code") {
				mood = "warn"
			}
		}
		if mood == "" && (v.Op == nucleus.ReadFiles || v.Op == nucleus.GlobSearch || v.Op == nucleus.GrepSearch) {
			mood = "hollow"
		}
		for _, name := range names(v) {
			n.add(name, s.mark(v, until, mood))
		}
	}
	return n.lanes()
}

func opOf(v *event) []string { return []string{v.row.Op} }

func filesOf(v *event) (names []string) {
	for _, file := range v.action.Files[:min(len(v.action.Files), 20)] {
		names = append(names, approval.Visible(file.Path))
	}
	if len(names) == 0 {
		return []string{v.row.Op}
	}
	return names
}

// end is the end of a long path or host, which tells more than its beginning.
func end(text string) string {
	const most = 23
	if len(text) > most {
		return "..." + text[len(text)-most+3:]
	}
	return text
}

func programOf(v *event) []string {
	c := v.action.Command
	switch {
	case v.action.Job != nil:
		return []string{"background"}
	case c == nil || len(c.Argv) == 0:
		return []string{"?"}
	case c.Script:
		return []string{approval.Visible(path.Base(c.Argv[0])) + " (script)"}
	}
	return []string{approval.Visible(path.Base(c.Argv[0]))}
}

func (s *story) networkLanes() []lane {
	var n named
	open := map[string]*event{}
	for i := range s.events {
		v := &s.events[i]
		switch {
		case v.Kind == nucleus.KindEgressOpen:
			open[v.x.Attempt] = v
		case v.Kind == nucleus.KindEgressClose && open[v.x.Attempt] != nil:
			n.add(place(v.x.Host, v.x.Port), s.mark(open[v.x.Attempt], v.at, ""))
			delete(open, v.x.Attempt)
		case groupOf(v.Entry) != "network" || !refused(v.Entry) || v.Kind == nucleus.KindOutcome:
		default:
			n.add(s.placeOf(v), s.mark(v, v.at, "bad"))
		}
	}
	for i := range s.events {
		if v := &s.events[i]; v.Kind == nucleus.KindEgressOpen && open[v.x.Attempt] == v {
			n.add(place(v.x.Host, v.x.Port), s.mark(v, s.end, ""))
		}
	}
	return n.lanes()
}

// placeOf is where a request would have gone; an answer to an ask has it of the ask.
func (s *story) placeOf(v *event) string {
	a := v.action
	if ask := s.asks[v.Ask]; ask != nil {
		a = ask.action
	}
	switch {
	case a.Connect != nil:
		return place(a.Connect.Host, a.Connect.Port)
	case a.Fetch != nil:
		return place(a.Fetch.Host, a.Fetch.Port)
	}
	if at, ok := attemptOf(v.Entry); ok {
		return place(at.Host, at.Port)
	}
	return "?"
}

func place(host string, port int) string {
	return fmt.Sprintf("%s:%d", approval.Visible(host), port)
}

// charts are what the calls to models cost, and what they left of a budget.
func (s *story) charts() (list []chart) {
	var tokens, dollars series
	left := map[string]*series{}
	for i := range s.events {
		v := &s.events[i]
		if v.Kind != nucleus.KindModelCall || !v.x.Done {
			continue
		}
		x := s.scale.at(v.at)
		tokens.add(x, tokens.last()+float64(v.x.Tokens.Input+v.x.Tokens.Output))
		dollars.add(x, dollars.last()+v.x.USD)
		for name, n := range v.x.Left {
			if left[name] == nil {
				left[name] = &series{}
			}
			left[name].add(x, n)
		}
	}
	if tokens.most() > 0 {
		list = append(list, chart{"tokens used", tokensOf(tokens.last()), "tokens", tokens.path(true)})
	}
	if dollars.most() > 0 {
		list = append(list, chart{"cost", dollarsOf(dollars.last()), "dollars", dollars.path(true)})
	}
	for _, dim := range []struct {
		name, label string
		text        func(float64) string
	}{{"usd", "dollars left", dollarsOf}, {"tokens", "tokens left", tokensOf}, {"seconds", "seconds left", secondsOf}} {
		if l := left[dim.name]; l != nil {
			class := "left"
			if l.last() <= 0 {
				class = "spent"
			}
			list = append(list, chart{dim.label, dim.text(l.last()), class, l.path(false)})
		}
	}
	return list
}

func dollarsOf(n float64) string { return fmt.Sprintf("$%.4f", n) }
func tokensOf(n float64) string  { return grouped(int64(n)) }
func secondsOf(n float64) string { return fmt.Sprintf("%.0f s", n) }

// series is a value that changes in steps.
type series struct{ x, y []float64 }

func (s *series) add(x, y float64) { s.x, s.y = append(s.x, x), append(s.y, y) }

func (s *series) last() float64 {
	if len(s.y) == 0 {
		return 0
	}
	return s.y[len(s.y)-1]
}

func (s *series) most() float64 {
	if len(s.y) == 0 {
		return 0
	}
	return slices.Max(s.y)
}

// path draws the series from the left edge, at 0 or at its first value, to the right one.
func (s *series) path(fromZero bool) string {
	top := max(s.most(), 1e-12)
	y := func(v float64) float64 { return 96 - 92*max(v, 0)/top }
	first := 0.0
	if !fromZero {
		first = s.y[0]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "M0 100V%.1f", y(first))
	for i := range s.x {
		fmt.Fprintf(&b, "H%.1fV%.1f", s.x[i]*10, y(s.y[i]))
	}
	b.WriteString("H1000V100Z")
	return b.String()
}

// grouped is a number with a comma at each thousand.
func grouped(n int64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// lines go through all lanes: each refusal, and where the first two legs met.
func (s *story) lines() (list []tick) {
	seen := map[string]bool{}
	for i := range s.events {
		if v := &s.events[i]; refused(v.Entry) {
			at := percent(s.scale.at(v.at))
			if !seen[at] && len(list) < 300 {
				list = append(list, tick{At: at, Tone: "bad"})
			}
			seen[at] = true
		}
	}
	if v := s.met(); v != nil {
		list = append(list, tick{At: percent(s.scale.at(v.at)), Tone: "warn", Text: "private and untrusted have met"})
	}
	return list
}

func (s *story) refusals() (list []row) {
	for _, r := range s.rows {
		if r.Tone == "bad" {
			list = append(list, r)
		}
	}
	return list
}

func (s *story) kinds() (list []string) {
	for _, name := range []string{"files", "commands", "network", "git", "pods", "model", "session"} {
		if slices.ContainsFunc(s.rows, func(r row) bool { return r.Group == name }) {
			list = append(list, name)
		}
	}
	return list
}

func (s *story) title() string {
	workspace, below, agent := "", "", ""
	for _, v := range s.events {
		workspace, below, agent = cmp.Or(workspace, v.x.Workspace), cmp.Or(below, v.x.below()), cmp.Or(agent, v.x.Agent)
	}
	return approval.Visible(strings.Join(filled(cmp.Or(workspace, below, "session"), agent), " | "))
}

// counts are what a reader asks first.
type counts struct {
	requests, asked, granted, denied, refused int
	commands, failed, calls, connections      int
	read, changed                             map[string]bool
	in, out                                   int64
	dollars                                   float64
	driver, tier, mode, policy, result        string
}

func (s *story) count() counts {
	c := counts{read: map[string]bool{}, changed: map[string]bool{}}
	for i := range s.events {
		v := &s.events[i]
		if refused(v.Entry) {
			c.refused++
		}
		switch v.Kind {
		case nucleus.KindIntent:
			c.request(v)
		case nucleus.KindOutcome:
			if v.Op == nucleus.RunBash && (v.row.Tone == "warn" || strings.HasPrefix(v.row.What, "exit code")) {
				c.failed++
			}
		case nucleus.KindApprovalAsk:
			c.asked++
		case nucleus.KindApprovalUse:
			c.granted++
		case nucleus.KindApprovalDeny:
			c.denied++
		case nucleus.KindEgressOpen:
			c.connections++
		case nucleus.KindModelCall:
			if v.x.Done {
				c.calls, c.in, c.out, c.dollars = c.calls+1, c.in+v.x.Tokens.Input, c.out+v.x.Tokens.Output, c.dollars+v.x.USD
			}
		case nucleus.KindPodCreate:
			c.driver, c.tier, c.mode = cmp.Or(c.driver, v.x.Driver), cmp.Or(c.tier, v.x.Tier), cmp.Or(c.mode, v.x.Mode)
		case nucleus.KindPolicyLoad:
			c.policy = cmp.Or(c.policy, v.x.Policy.Name)
		case nucleus.KindSessionEnd:
			if v.x.ExitCode != nil {
				c.result = fmt.Sprintf("exit code %d", *v.x.ExitCode)
			}
		}
	}
	return c
}

func (c *counts) request(v *event) {
	c.requests++
	if refused(v.Entry) {
		return
	}
	switch v.Op {
	case nucleus.RunBash:
		c.commands++
	case nucleus.ReadFiles:
		for _, file := range v.action.Files {
			c.read[file.Path] = true
		}
	case nucleus.WriteFiles, nucleus.EditFiles:
		for _, file := range v.action.Files {
			c.changed[file.Path] = true
		}
	}
}

func (s *story) facts() (list []fact) {
	c := s.count()
	add := func(name, value, tone string) {
		if value != "" {
			list = append(list, fact{name, value[:min(len(value), 80)], tone})
		}
	}
	when := func(is bool, tone string) string {
		if is {
			return tone
		}
		return ""
	}
	add("Ran", span(s.end.Sub(s.start)), "")
	add("Requests", grouped(int64(c.requests)), "")
	add("Refused", grouped(int64(c.refused)), cmp.Or(when(c.refused > 0, "bad"), "good"))
	if c.asked > 0 {
		add("Asked a person", fmt.Sprintf("%d: %d granted, %d denied", c.asked, c.granted, c.denied), "warn")
	}
	var legs []string
	taken := s.legs()
	for _, leg := range []struct{ name, label string }{{"private", "private"}, {"untrusted", "untrusted"}, {"way_out", "way out"}} {
		if taken[leg.name] != nil {
			legs = append(legs, leg.label)
		}
	}
	add("Exposure", cmp.Or(strings.Join(legs, ", "), "none"), cmp.Or(when(s.met() != nil, "warn"), "good"))
	if len(c.read)+len(c.changed) > 0 {
		add("Files", fmt.Sprintf("%d read, %d changed", len(c.read), len(c.changed)), "")
	}
	add("Commands", strings.Join(filled(fmt.Sprint(c.commands), when(c.failed > 0, fmt.Sprintf("%d failed", c.failed))), ", "), "")
	if c.connections > 0 {
		add("Connections", fmt.Sprint(c.connections), "")
	}
	if c.calls > 0 {
		add("Model", fmt.Sprintf("%d calls, %s tokens", c.calls, grouped(c.in+c.out)), "")
	}
	if c.dollars > 0 {
		add("Cost", fmt.Sprintf("$%.4f", c.dollars), "")
	}
	add("Machine", approval.Visible(strings.Join(filled(c.driver, c.tier, c.mode), ", ")), "")
	add("Policy", approval.Visible(c.policy), "")
	add("Agent ended", c.result, when(c.result != "" && c.result != "exit code 0", "warn"))
	return list
}
