package timeline

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// What says in one line of printable ASCII what an entry is about; empty where its kind
// says all.
func What(e nucleus.Entry) string {
	var a nucleus.Action
	if len(e.Args) > 0 && json.Unmarshal(e.Args, &a) == nil && a.Op != "" {
		line := approval.Summary(nucleus.AskRequest{Action: a})
		return strings.TrimPrefix(strings.TrimPrefix(line, string(a.Op)), " ")
	}
	if a, ok := attemptOf(e); ok {
		return short(a.String())
	}
	if len(e.Args) > 0 { // as they came: they stood for nothing
		return short(approval.Visible(string(e.Args)))
	}
	return short(approval.Visible(said(e)))
}

// attempt is a try to reach something outside of which nothing was resolved: what does not
// pass the model's route, for one.
type attempt struct {
	Via    string `json:"via"`
	Host   string `json:"host"`
	Port   int    `json:"port"`
	Method string `json:"method"`
	Path   string `json:"path"`
}

func attemptOf(e nucleus.Entry) (a attempt, ok bool) {
	ok = len(e.Args) > 0 && json.Unmarshal(e.Args, &a) == nil && a.Via != "" && a.Host != ""
	return a, ok
}

// String is printable ASCII, as "HEAD / by model, 127.0.0.1:443".
func (a attempt) String() string {
	return strings.Join(filled(approval.Visible(strings.Join(filled(a.Method, a.Path, "by", a.Via), " ")), place(a.Host, a.Port)), ", ")
}

func short(line string) string {
	const most = 160
	if len(line) > most {
		return line[:most-3] + "..."
	}
	return line
}

// extra is what the data of the known kinds has for a reader.
type extra struct {
	Host      string `json:"host"`
	Port      int    `json:"port"`
	Sent      int64  `json:"sent"`
	Received  int64  `json:"received"`
	Agent     string `json:"agent"`
	ExitCode  *int   `json:"exit_code"`
	Driver    string `json:"driver"`
	Tier      string `json:"tier"`
	Mode      string `json:"mode"`
	Workspace string `json:"workspace"`
	Sub       struct {
		Parent string `json:"parent"`
	} `json:"sub"`
	Repo    string `json:"repo"`
	Branch  string `json:"branch"`
	Base    string `json:"base"`
	Head    string `json:"head"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Summary string `json:"summary"`
	Bytes   int64  `json:"bytes"`
	Done    bool   `json:"done"`
	Status  int    `json:"status"`
	Model   string `json:"model"`
	Tokens  struct {
		Input  int64 `json:"input"`
		Output int64 `json:"output"`
	} `json:"tokens"`
	ID      string             `json:"id"`
	Attempt string             `json:"attempt"`
	USD     float64            `json:"usd"`
	Left    map[string]float64 `json:"left"` // of a budget, by dimension
	Took    time.Duration      `json:"took"`

	Dimension string  `json:"dimension"`
	Limit     float64 `json:"limit"`
	Spent     float64 `json:"spent"`
	Policy    struct {
		Name string `json:"name"`
	} `json:"policy"`
}

func extraOf(e nucleus.Entry) (x extra) {
	// Data of a kind that is not known may have these names in other forms: what fits is
	// taken, the rest left.
	_ = json.Unmarshal(e.Data, &x)
	return x
}

// below says of which pod this one is a sub-pod.
func (x extra) below() string {
	if x.Sub.Parent == "" {
		return ""
	}
	return "below " + x.Sub.Parent
}

func said(e nucleus.Entry) string {
	x := extraOf(e)
	switch e.Kind {
	case nucleus.KindModelCall:
		if !x.Done {
			return x.Host + ", begun"
		}
		return strings.TrimSpace(fmt.Sprintf("%s %d in, %d out, %s", x.Model, x.Tokens.Input, x.Tokens.Output, round(x.Took)))
	case nucleus.KindEgressOpen:
		return fmt.Sprintf("%s:%d", x.Host, x.Port)
	case nucleus.KindEgressClose:
		return fmt.Sprintf("%s:%d, %s sent, %s received", x.Host, x.Port, size(x.Sent), size(x.Received))
	case nucleus.KindSessionStart:
		return x.Agent
	case nucleus.KindSessionBudget:
		return fmt.Sprintf("of %g %s, %g are spent", x.Limit, x.Dimension, x.Spent)
	case nucleus.KindSessionEnd:
		if x.ExitCode != nil {
			return fmt.Sprintf("exit code %d", *x.ExitCode)
		}
	case nucleus.KindPodCreate:
		return strings.Join(filled(x.Workspace, x.below(), x.Mode, x.Driver, x.Tier), ", ")
	case nucleus.KindPolicyLoad:
		if x.Policy.Name != "" {
			return "policy " + x.Policy.Name
		}
	case nucleus.KindRepoImport:
		return fmt.Sprintf("%s %s at %.12s", x.Repo, x.Branch, x.Base)
	case nucleus.KindRepoFetch:
		return fmt.Sprintf("%s %s at %.12s", x.Repo, x.Branch, x.Head)
	case nucleus.KindLogTorn:
		return fmt.Sprintf("%d bytes of an append that did not finish", x.Bytes)
	}
	return strings.Join(filled(x.Summary, x.Reason, x.Message), "; ")
}

func filled(texts ...string) (list []string) {
	for _, text := range texts {
		if text != "" {
			list = append(list, text)
		}
	}
	return list
}

// round is a duration as people say it.
func round(d time.Duration) string {
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}

func size(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}
