package approval

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"cal/nucleus"
	"cal/policy/command"
)

// View says how an ask is drawn. The zero value is 80 columns, long parts cut.
type View struct {
	Width int  // columns; below 40 counts as 40, 0 as 80
	Whole bool // cut nothing
}

// Screen is an ask as a person sees it.
//
// Text consists of printable ASCII and newlines alone: every other character is
// written as its code point, \u{202e}, and a backslash as \\. A line at the left
// edge is this program's own. What the ask says stands behind a label, or behind
// "  | " for the lines of a longer text; "  : " carries on the line above, and
// "  ~ " says that lines were left out, how many, and the digest of the whole.
// No text of an ask can imitate any of these.
type Screen struct {
	Digest string // of the bytes it was drawn from
	Text   string
	Cut    bool // something was left out; View.Whole shows it
}

// A section keeps at most headLines + tailLines of its lines: the end is shown
// too, since that is where something would be hidden.
const (
	headLines = 45
	tailLines = 15
)

// Draw makes the screen of an ask from its canonical bytes: the action, and what a
// grant opens beyond it, stand last, next to the question. It fails where the ask has no digest.
func Draw(ask nucleus.AskRequest, view View) (Screen, error) {
	digest, canonical, err := Digest(ask)
	if err != nil {
		return Screen{}, err
	}
	// What is drawn has gone through the signed bytes, whatever the caller holds.
	var signed nucleus.AskRequest
	if err := nucleus.Strict(canonical, &signed); err != nil {
		return Screen{}, fmt.Errorf("ask %q: %w", ask.ID, err)
	}
	d := drawing{width: max(view.Width, 40), whole: view.Whole}
	if view.Width == 0 {
		d.width = 80
	}
	d.head(signed, digest)
	d.why(signed)
	for i, detail := range signed.Detail {
		d.begin(fmt.Sprintf("detail %d of %d", i+1, len(signed.Detail)))
		d.field("title", quote(detail.Title))
		d.block(detail.Text)
		d.end(detail)
	}
	d.subPolicy(signed.Action.Sub)
	d.asked(signed)
	d.action(signed)
	d.passage(signed)
	return Screen{digest, d.out.String(), d.cut}, nil
}

// Summary is the action of an ask in one line of printable ASCII.
func Summary(ask nucleus.AskRequest) string {
	a := ask.Action
	line := string(a.Op)
	switch {
	case a.Push != nil:
		line += " " + Visible(a.Push.Ref) + " to " + Visible(a.Push.Remote)
	case a.PR != nil:
		line += " " + Visible(a.PR.Repository) + ": " + Visible(a.PR.Title)
	case a.Fetch != nil:
		line += " " + Visible(a.Fetch.Method) + " " + Visible(a.Fetch.URL)
	case a.Connect != nil:
		line += " " + Visible(a.Connect.Host) + ":" + strconv.Itoa(a.Connect.Port)
	case a.Command != nil:
		line += " (" + command.Of(*a.Command).Class.String() + ")"
		for _, arg := range a.Command.Argv {
			line += " " + quote(arg)
		}
	case a.Job != nil:
		line += " background command " + Visible(a.Job.ID)
	case a.Sub != nil:
		line = strings.TrimRight(fmt.Sprintf("%s %s %s %s", line, Visible(string(a.Sub.Do)), Visible(a.Sub.Pod), Visible(a.Sub.Task)), " ")
	case a.Commit != nil:
		line += " " + Visible(a.Commit.Repo) + ": " + Visible(a.Commit.Message)
	case len(a.Files) > 0:
		line += " " + Visible(a.Files[0].Path)
		if n := len(a.Files) - 1; n > 0 {
			line += fmt.Sprintf(" and %d more", n)
		}
	}
	const most = 160
	if len(line) > most {
		line = line[:most-3] + "..."
	}
	return line
}

// Visible writes s in printable ASCII: what is not becomes its code point, and
// a backslash is doubled so that no text can imitate one.
func Visible(s string) string {
	var out strings.Builder
	for i, r := range s {
		switch {
		case r == '\\':
			out.WriteString(`\\`)
		case r >= 0x20 && r < 0x7f:
			out.WriteRune(r)
		case r == '\n':
			out.WriteString(`\n`)
		case r == '\t':
			out.WriteString(`\t`)
		case r == '\r':
			out.WriteString(`\r`)
		case r == 0xfffd && s[i] != 0xef:
			fmt.Fprintf(&out, `\x{%02x}`, s[i]) // not UTF-8; Digest refuses it, a listing may meet it
		default:
			fmt.Fprintf(&out, `\u{%x}`, r)
		}
	}
	return out.String()
}

// Plain is Visible for a text that should be visible already, and came from somebody who may
// not have made it so: what is printable stays as it is.
func Plain(s string) string {
	for _, r := range s {
		if r < 0x20 || r >= 0x7f {
			return Visible(s)
		}
	}
	return s
}

func quote(s string) string { return `"` + strings.ReplaceAll(Visible(s), `"`, `\"`) + `"` }

type drawing struct {
	width   int
	whole   bool
	cut     bool
	out     strings.Builder
	section []string
}

func (d *drawing) begin(title string) {
	d.section = d.section[:0]
	d.out.WriteString(title + "\n")
}

// end writes the section; source is what it shows, for the digest of the whole.
func (d *drawing) end(source any) {
	lines := d.section
	if cut := len(lines) - headLines - tailLines; cut > 0 && !d.whole {
		d.cut = true
		whole, err := nucleus.Canonical(source)
		if err != nil {
			panic(err) // it is a part of what has canonical bytes
		}
		d.write(lines[:headLines])
		d.write([]string{
			fmt.Sprintf("  ~ %d of %d lines are cut here", cut, len(lines)),
			fmt.Sprintf("  ~ whole: %d bytes", len(whole)),
			"  ~ sha256 " + nucleus.SHA256(whole)[:32],
			"  ~        " + nucleus.SHA256(whole)[32:],
		})
		lines = lines[len(lines)-tailLines:]
	}
	d.write(lines)
}

func (d *drawing) write(lines []string) {
	for _, line := range lines {
		d.out.WriteString(line)
		d.out.WriteByte('\n')
	}
}

// line adds one logical line, wrapped here: a terminal that wraps would put text
// of the ask at the left edge.
func (d *drawing) line(text string) {
	for prefix := ""; ; prefix = "  : " {
		room := d.width - len(prefix)
		if len(text) <= room {
			d.section = append(d.section, prefix+text)
			return
		}
		d.section = append(d.section, prefix+text[:room])
		text = text[room:]
	}
}

func (d *drawing) field(label, value string) { d.line(fmt.Sprintf("  %-11s %s", label, value)) }

// amounts are those of a budget that are not 0.
func (d *drawing) amounts(label string, a nucleus.Amounts) {
	for _, of := range nucleus.Dimensions() {
		if n := *a.Of(of); n != 0 {
			d.field(label, of.Text(n)+" "+of.Unit())
		}
	}
}

// block adds text line by line. A space at a line's end is made visible.
func (d *drawing) block(text string) {
	for _, line := range strings.Split(text, "\n") {
		body := strings.TrimRight(line, " ")
		d.line("  | " + Visible(body) + strings.Repeat(`\u{20}`, len(line)-len(body)))
	}
}

// text adds a value that may have several lines.
func (d *drawing) text(label, value string) {
	if !strings.Contains(value, "\n") {
		d.field(label, quote(value))
		return
	}
	d.field(label, fmt.Sprintf("%d lines:", strings.Count(value, "\n")+1))
	d.block(value)
}

// host adds a field that holds a host name, or a URL. An internationalised name is ASCII
// on the wire and may look like another one elsewhere (RFC 5890, 4.4).
func (d *drawing) host(label, value string) {
	d.field(label, quote(value))
	for _, note := range oddNames(value) {
		d.field("LOOK", note)
	}
}

func (d *drawing) head(ask nucleus.AskRequest, digest string) {
	d.begin("who asks")
	d.field("ask", quote(ask.ID))
	d.field("signed", digest)
	d.field("pod", quote(ask.Pod))
	d.field("workspace", quote(ask.Workspace))
	d.field("session", quote(ask.Session))
	d.field("boot", quote(ask.Boot))
	d.field("requester", quote(ask.Requester))
	d.field("request", nucleus.SHA256(ask.Request))
	d.field("mode", quote(ask.Mode))
	d.field("tier", quote(ask.Tier))
	d.field("asked", moment(ask.Created))
	d.field("until", moment(ask.Expires))
	d.end(ask)
}

func (d *drawing) why(ask nucleus.AskRequest) {
	d.begin("why you are asked")
	d.field("rule", quote(ask.Rule))
	d.text("because", ask.Why)
	if ask.Approvals != 1 {
		d.field("needs", fmt.Sprintf("%d different approvers; you are one of them", ask.Approvals))
	}
	d.field("policy", quote(ask.Policy))
	d.field("decided", moment(ask.Context.UnixMilli))
	d.field("exposure", legs(ask.Context.Exposure))
	if ask.Takes != 0 {
		d.field("takes", legs(ask.Takes))
	}
	d.amounts("spent", ask.Context.Spent)
	d.amounts("set aside", ask.Context.Reserved)
	for _, flag := range []struct {
		set  bool
		says string
	}{
		{ask.Context.UntrustedRepo, "the machine holds a repository labelled untrusted"},
		{ask.Context.Contained, "contained mode: the agent acts freely inside the machine"},
		{ask.Context.DirectNetwork, "the machine has a network that does not pass the gateway"},
	} {
		if flag.set {
			d.field("note", flag.says)
		}
	}
	for _, e := range ask.Evidence {
		d.field("log entry", fmt.Sprintf("%d leg %s: %s", e.Seq, quote(e.Leg), quote(e.What)))
	}
	d.end(struct {
		Rule, Why string
		Context   nucleus.Context
		Evidence  []nucleus.Evidence
	}{ask.Rule, ask.Why, ask.Context, ask.Evidence})
}

func legs(l nucleus.Legs) string {
	text := strings.Join(l.Names(), ", ")
	if text == "" {
		text = "none"
	}
	if unknown := l &^ (nucleus.Private | nucleus.Untrusted | nucleus.WayOut); unknown != 0 {
		text += fmt.Sprintf(", unknown 0x%x", uint8(unknown))
	}
	return text
}

const dropsNote = "no fast-forward: commits that the remote's branch has are dropped from it"

// asked are the arguments that an action holds as digests alone, or not at all, as the
// requester signed them.
var asked = map[nucleus.Op][]string{
	nucleus.WriteFiles: {"content", "mode"},
	nucleus.EditFiles:  {"old", "new", "all"},
	nucleus.WebFetch:   {"body"},
	nucleus.RunBash:    {"stdin", "background", "timeout_s"},
}

// asked shows what the requester signed where the action has its digest. The authority takes
// an ask only where the action's digest of the arguments is that of what was signed; whoever
// draws another one is told.
func (d *drawing) asked(ask nucleus.AskRequest) {
	names := asked[ask.Action.Op]
	if len(names) == 0 {
		return
	}
	d.begin("what the requester signed")
	args, err := signedArguments(ask)
	if err != nil {
		d.field("NOTE", err.Error())
		d.end(ask.Request)
		return
	}
	for _, name := range names {
		value, ok := args[name]
		if !ok {
			continue
		}
		var text string
		if json.Unmarshal(value, &text) != nil {
			d.field(name, Visible(string(value)))
			continue
		}
		d.text(name, text)
		if want, named := digestOf(ask.Action, name); named && want != nucleus.SHA256([]byte(text)) && want+text != "" {
			d.field("NOTE", "its digest is not the one below: "+nucleus.SHA256([]byte(text)))
		}
	}
	d.end(ask.Request)
}

// signedArguments are those of the request that came with an ask, each as JSON.
func signedArguments(ask nucleus.AskRequest) (map[string]json.RawMessage, error) {
	var request struct {
		Body []byte `json:"body_b64"`
	}
	if err := json.Unmarshal(ask.Request, &request); err != nil || len(request.Body) == 0 {
		return nil, errors.New("the request that came with this ask holds no arguments")
	}
	canonical, err := nucleus.CanonicalJSON(request.Body)
	if err != nil {
		return nil, errors.New("the arguments that came with this ask cannot be read")
	}
	if nucleus.SHA256(canonical) != ask.Action.Args {
		return nil, errors.New("the arguments that came with this ask are not those whose digest stands below")
	}
	var args map[string]json.RawMessage
	if err := json.Unmarshal(canonical, &args); err != nil {
		return nil, errors.New("the arguments that came with this ask are no object")
	}
	return args, nil
}

// digestOf is the digest that an action holds of one of its arguments.
func digestOf(a nucleus.Action, argument string) (digest string, named bool) {
	switch {
	case argument == "content" && len(a.Files) == 1:
		return a.Files[0].After, true
	case argument == "body" && a.Fetch != nil:
		return a.Fetch.Body, true
	case argument == "stdin" && a.Command != nil:
		return a.Command.Stdin, true
	}
	return "", false
}

func (d *drawing) action(ask nucleus.AskRequest) {
	a := ask.Action
	d.begin("what will happen: " + string(a.Op))
	d.files("file", a.Files)
	d.command(a.Command)
	if f := a.Fetch; f != nil {
		d.field("method", quote(f.Method))
		d.field("url", quote(f.URL))
		d.host("host", f.Host)
		d.field("port", strconv.Itoa(f.Port))
		d.field("path", quote(f.Path))
		d.pairs("header", f.Headers)
		d.field("body", strconv.Itoa(f.Bytes)+" bytes")
		d.field("  digest", quote(f.Body))
	}
	if c := a.Connect; c != nil {
		d.host("host", c.Host)
		d.field("port", strconv.Itoa(c.Port))
		d.field("note", "what the connection will carry is not known")
	}
	if p := a.Push; p != nil {
		d.field("repository", quote(p.Repo))
		d.host("remote", p.Remote)
		d.field("ref", quote(p.Ref))
		d.field("old", quote(p.Old))
		d.field("new", quote(p.New))
		if p.Drops {
			d.field("note", dropsNote)
		}
		if len(ask.Detail) == 0 {
			d.field("note", "no commits, files or diff were given with this push")
		}
	}
	if p := a.PR; p != nil {
		d.field("repository", quote(p.Repository))
		d.host("api", p.API)
		d.field("base", quote(p.Base))
		d.field("head", quote(p.Head))
		d.field("head id", quote(p.HeadID))
		d.text("title", p.Title)
		d.text("body", p.Body)
	}
	if c := a.Commit; c != nil {
		d.field("repository", quote(c.Repo))
		d.field("name", quote(c.Name))
		d.field("email", quote(c.Email))
		for _, path := range c.Paths {
			d.field("path", quote(path))
		}
		d.text("message", c.Message)
	}
	if j := a.Job; j != nil {
		d.field("job", quote(j.ID))
		if j.Stop {
			d.field("action", "stop it")
		} else {
			d.field("action", "read its output")
		}
	}
	d.sub(a.Sub)
	d.field("arguments", quote(a.Args))
	d.field("digest", quote(ask.Digest))
	d.end(a)
}

// subPolicy shows the whole policy of a pod that is asked for, a line for each value.
func (d *drawing) subPolicy(s *nucleus.Sub) {
	if s == nil || len(s.Policy) == 0 {
		return
	}
	d.begin("the policy of the new pod")
	var lines bytes.Buffer
	if err := json.Indent(&lines, s.Policy, "", " "); err != nil { // signed, so it is JSON
		lines.Write(s.Policy)
	}
	d.block(lines.String())
	d.end(s.Policy)
}

// sub says what is done to a pod below the one that asks.
func (d *drawing) sub(s *nucleus.Sub) {
	if s == nil {
		return
	}
	d.field("do", quote(string(s.Do)))
	for _, f := range []struct{ label, value string }{
		{"pod", s.Pod}, {"agent", s.Agent}, {"driver", s.Driver}, {"tier", string(s.Tier)}, {"mode", string(s.Mode)},
		{"repository", s.Repo}, {"branch", s.Branch}, {"commit", s.Commit},
	} {
		if f.value != "" {
			d.field(f.label, quote(f.value))
		}
	}
	if r := s.Resources; r != nil {
		d.field("resources", fmt.Sprintf("cpu %d, memory_mb %d, pids %d, disk_mb %d (0: the default)", r.CPU, r.MemoryMB, r.Pids, r.DiskMB))
	}
	for _, name := range s.Env {
		d.field("env", quote(name))
	}
	if s.Keep {
		d.field("note", "the pod stays when its agent has ended")
	}
	if len(s.Policy) > 0 {
		d.field("policy", "as above, "+quote(nucleus.SHA256(s.Policy)))
	}
	if s.Do == nucleus.SubSpawn {
		d.text("task", s.Task)
	}
}

// passage says what a grant opens beyond the request that it was asked for.
func (d *drawing) passage(ask nucleus.AskRequest) {
	p := ask.Passage
	if p == nil {
		return
	}
	d.begin("what a grant opens")
	what := "every " + string(ask.Action.Op) + " of this session"
	if ask.Action.Op == nucleus.WebFetch {
		what += ", whatever its method, path and body"
	}
	d.field("passage", what)
	d.field("to", quote(p.Host)+" port "+strconv.Itoa(p.Port))
	d.field("for", (time.Duration(p.Millis)*time.Millisecond).String()+" from its first use")
	d.field("while", "no other operation takes more than: "+legs(p.Exposure))
	d.end(p)
}

func (d *drawing) command(c *nucleus.Command) {
	if c == nil {
		return
	}
	d.reading(command.Of(*c))
	if c.Script {
		d.field("note", "a shell runs the script below")
	}
	for i, arg := range c.Argv {
		d.text(fmt.Sprintf("argv[%d]", i), arg)
	}
	d.field("binary", quote(c.Binary))
	d.field("directory", quote(c.Dir))
	d.pairs("env", c.Env)
	if c.Stdin != "" {
		d.field("stdin", quote(c.Stdin))
	}
	if c.TTY {
		d.field("note", "runs on a terminal")
	}
	d.files("names file", c.Files)
}

// Of the programs in a command a screen shows so many, and of each so much: they are
// read from the argv below, which stands there whole.
const (
	maxPrograms = 12
	maxProgram  = 160
)

// reading says what was understood of a command: its class, in plain words, and the
// programs in it, the worst first.
func (d *drawing) reading(r command.Reading) {
	d.field("class", r.Class.String()+": "+r.Class.Says())
	d.field("because", quote(r.Why))
	programs := programsOf(r)
	shown := len(programs)
	if shown > maxPrograms && !d.whole {
		shown, d.cut = maxPrograms, true
	}
	for _, p := range programs[:shown] {
		if len(p.argv) > maxProgram && !d.whole {
			p.argv, d.cut = p.argv[:maxProgram]+" ...", true
		}
		if p.times > 1 {
			p.argv += fmt.Sprintf(" (%d times)", p.times)
		}
		d.field("runs", p.class.String()+": "+p.argv)
	}
	if n := len(programs) - shown; n > 0 {
		d.field("runs", fmt.Sprintf("and %d more, none of a worse class", n))
	}
}

type ranProgram struct {
	class command.Class
	argv  string // quoted
	times int
}

// programsOf is each program of a reading once, the worst first. A word that is not known
// before it runs is a ? without quotes.
func programsOf(r command.Reading) []ranProgram {
	var all []ranProgram
	place := map[ranProgram]int{}
	for _, part := range r.Parts {
		words := make([]string, len(part.Argv))
		for i, word := range part.Argv {
			if words[i] = quote(word); word == "?" {
				words[i] = "?"
			}
		}
		p := ranProgram{class: part.Class, argv: strings.Join(words, " ")}
		if at, seen := place[p]; seen {
			all[at].times++
			continue
		}
		place[p] = len(all)
		p.times = 1
		all = append(all, p)
	}
	slices.SortStableFunc(all, func(a, b ranProgram) int { return cmp.Compare(b.class, a.class) })
	return all
}

func (d *drawing) files(label string, files []nucleus.File) {
	for _, f := range files {
		d.field(label, quote(f.Path))
		if f.Before != "" {
			d.field("  before", quote(f.Before))
		}
		if f.After != "" {
			d.field("  after", quote(f.After))
		}
	}
}

func (d *drawing) pairs(label string, pairs map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(pairs)) {
		d.field(label, quote(name)+" = "+quote(pairs[name]))
	}
}

func moment(ms int64) string {
	return time.UnixMilli(ms).UTC().Format("2006-01-02 15:04:05.000 MST")
}
