package workspace

import (
	"fmt"
	"strconv"
	"strings"

	"cal/internal/git"
	"cal/nucleus"
)

// Confirmation says, a line each, what is about to be launched and what is handed over: what
// the node would make of the plan, and who can approve. It holds no secret, and nothing that
// moves a terminal's cursor.
func (p *Plan) Confirmation(pod nucleus.PodStatus, approvals string) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-13s%s\n", name, Shown(fmt.Sprintf(format, args...)))
	}
	switch {
	case p.Spec.Workspace == "":
		line("workspace", "none: what is made in the machine ends with it")
	case p.known != nil && p.known.Head != "":
		line("workspace", "%s, goes on at %.12s", p.Spec.Workspace, p.known.Head)
	case p.known != nil:
		line("workspace", "%s, goes on", p.Spec.Workspace)
	default:
		line("workspace", "%s", p.Spec.Workspace)
	}
	line("machine", "not running; %s starts it", pod.Driver)
	line("environments", "%s", strings.Join(pod.Environments, ", "))
	if p.Spec.Agent != nil {
		line("agent", "%s", strings.TrimSpace(p.Spec.Agent.Name+" "+p.version))
	}
	for i, r := range p.Spec.Repos {
		base := r.Base
		if p.known != nil {
			base = p.known.Base
		}
		line("repo", "%s at %.12s", r.Path, base)
		line("branch", "%s", r.Branch)
		if i < len(pod.Repos) {
			label := "untrusted"
			if pod.Repos[i].Trusted {
				label = "trusted"
			}
			line("label", "%s: %s", label, pod.Repos[i].Why)
		}
	}
	tightened := ""
	if p.tightened {
		tightened = ", tightened by the repository's .cal/policy.yaml"
	}
	line("policy", "%s%s", p.policy, tightened)
	if pod.Budget.Limited() {
		line("budget", "%s", limits(pod.Budget))
	}
	line("mode", "%s", Mode(pod))
	line("tier", "%s", pod.Tier)
	line("approvals", "%s", approvals)
	handed := "handed over"
	hand := func(format string, args ...any) {
		line(handed, format, args...)
		handed = ""
	}
	if len(p.handed) > 0 {
		hand("variables of %s: %s", p.envFile, strings.Join(p.handed, ", "))
	}
	for _, l := range p.Spec.Image.Layers {
		if pod.Image != nucleus.ImageHost {
			break // they fit the host's programs, and are left out
		}
		hand("%s, read-only: %s", l.Name, l.Host)
	}
	if m := p.Spec.Model; m != nil {
		hand("model at %s; its key, from %s, stays on the host", git.WithoutCredentials(m.BaseURL), p.keyFrom)
	}
	if handed != "" {
		hand("nothing")
	}
	return b.String()
}

// HandedOver says in one line what a command gets besides the repository; "" for nothing.
func (p *Plan) HandedOver() string {
	if len(p.handed) == 0 {
		return ""
	}
	return Shown(fmt.Sprintf("variables of %s: %s", p.envFile, strings.Join(p.handed, ", ")))
}

// Mode is a pod's mode as the banner has it. In Safe Mode the agent reaches nothing but its
// model.
func Mode(pod nucleus.PodStatus) string {
	switch {
	case pod.Mode == nucleus.Mediated && !pod.Network:
		return "Safe Mode"
	case pod.Mode == nucleus.Mediated:
		return "mediated, network by policy"
	case !pod.Network:
		return string(pod.Mode) + ", no network"
	}
	return string(pod.Mode) + ", network by policy"
}

// Banner is the line on top of a session. It begins with words, for terminals without colours.
func Banner(pod nucleus.PodStatus) string {
	name := pod.Workspace
	if name == "" {
		name = pod.ID
	}
	parts := []string{"\U0001F512 CAL ISOLATION ACTIVE", name}
	if pod.Agent != "" {
		parts = append(parts, pod.Agent)
	}
	parts = append(parts, strings.Join(pod.Environments, ", "), Mode(pod), fmt.Sprintf("tier %s (%s)", pod.Tier, pod.Driver))
	return Shown(strings.Join(parts, " | "))
}

// Shown is a text of one line as a terminal may have it: names and addresses may come from a
// stranger, and hold what moves the cursor or looks like something else.
func Shown(text string) string {
	var b strings.Builder
	for _, r := range text {
		if strconv.IsGraphic(r) && r != '\uFFFD' {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
	}
	return b.String()
}

// limits says in one line what a session that begins may use up.
func limits(b *nucleus.Budget) string {
	var parts []string
	for _, d := range nucleus.Dimensions() {
		if s := b.Of(d); s.Limit != nil {
			parts = append(parts, d.Text(d.Amount(*s.Limit))+" "+d.Unit())
		}
	}
	return strings.Join(parts, ", ")
}

// Budget says in one line what of a pod's budget has a limit.
func Budget(b *nucleus.Budget) string {
	var parts []string
	for _, d := range nucleus.Dimensions() {
		if s := b.Of(d); s.Limit != nil {
			parts = append(parts, d.Unit()+" "+Spending(d, s))
		}
	}
	return strings.Join(parts, "; ")
}

// Spending says one dimension of a budget: "1.25 of 5.00, 3.75 left".
func Spending(d nucleus.Dimension, s *nucleus.Spending) string {
	text := func(number float64) string { return d.Text(d.Amount(number)) }
	if s.Limit == nil {
		return text(s.Spent) + ", no limit"
	}
	said := text(s.Spent) + " of " + text(*s.Limit)
	if s.Reserved > 0 {
		said += ", " + text(s.Reserved) + " set aside for sub-pods"
	}
	return said + ", " + text(*s.Left) + " left"
}
