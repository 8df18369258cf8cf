package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"cal/nucleus"
)

// Forge is where pull requests are opened. The token stays on the host.
type Forge struct {
	API   string // base URL; "" is GitHub's
	Token string
}

const githubAPI = "https://api.github.com"

func (f Forge) api() string {
	if f.API != "" {
		return f.API
	}
	return githubAPI
}

const forgeDeadline = 30 * time.Second

// open asks the forge for exactly the pull request that was decided: its branch must
// stand at the commit that was decided, by the forge's own word, before and after.
func (f Forge) open(ctx context.Context, pr nucleus.PR) (json.RawMessage, error) {
	if f.Token == "" {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "no GitHub token on the host (GH_TOKEN in the environment of cal when it starts the node)")
	}
	ctx, cancel := context.WithTimeout(ctx, forgeDeadline)
	defer cancel()
	at, err := f.head(ctx, pr)
	if err != nil {
		return nil, err
	}
	if at != pr.HeadID {
		return nil, nucleus.Errorf(nucleus.KindConflict, "branch %s is at %.12s here, on the remote at %.12q: git_push first", pr.Head, pr.HeadID, at)
	}
	// https://docs.github.com/rest/pulls/pulls#create-a-pull-request
	var opened struct {
		URL    string `json:"html_url"`
		Number int    `json:"number"`
		Head   struct {
			SHA string `json:"sha"`
		} `json:"head"`
	}
	asked := map[string]string{"title": pr.Title, "body": pr.Body, "base": pr.Base, "head": pr.Head}
	status, err := f.ask(ctx, pr, http.MethodPost, "/pulls", asked, &opened)
	if err != nil {
		return nil, err
	}
	if status != http.StatusCreated {
		return nil, nucleus.Errorf(nucleus.KindFailed, "create_pr: %s answered %d to the request for %s", pr.API, status, pr.Head)
	}
	if opened.Head.SHA != pr.HeadID {
		return nil, nucleus.Errorf(nucleus.KindConflict, "pull request %d (%s) was opened, but the branch had moved from %.12s to %.12q meanwhile: look at it, and close it where it is not what you wanted",
			opened.Number, opened.URL, pr.HeadID, opened.Head.SHA)
	}
	return json.Marshal(map[string]string{"url": opened.URL, "number": fmt.Sprint(opened.Number)})
}

// head is where the branch of a pull request stands on the forge; "" where there is none.
// https://docs.github.com/rest/git/refs#get-a-reference
func (f Forge) head(ctx context.Context, pr nucleus.PR) (string, error) {
	var ref struct {
		Ref    string `json:"ref"`
		Object struct {
			SHA string `json:"sha"`
		} `json:"object"`
	}
	parts := strings.Split(pr.Head, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	status, err := f.ask(ctx, pr, http.MethodGet, "/git/ref/heads/"+strings.Join(parts, "/"), nil, &ref)
	switch {
	case err != nil && status == http.StatusNotFound:
		return "", nil
	case err != nil:
		return "", err
	case ref.Ref != "refs/heads/"+pr.Head:
		return "", nucleus.Errorf(nucleus.KindFailed, "create_pr: %s names %q where refs/heads/%s was asked for", pr.API, cut(ref.Ref, 200), pr.Head)
	}
	return ref.Object.SHA, nil
}

// ask makes one request of the forge's API and reads its JSON answer.
func (f Forge) ask(ctx context.Context, pr nucleus.PR, method, path string, body, answer any) (status int, err error) {
	var raw []byte
	if body != nil {
		if raw, err = json.Marshal(body); err != nil {
			return 0, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, pr.API+"/repos/"+pr.Repository+path, bytes.NewReader(raw))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Accept", "application/vnd.github+json")
	req.Header.Set("Authorization", "Bearer "+f.Token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, doubtful(method, nucleus.Errorf(nucleus.KindFailed, "create_pr: %v", err))
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode < 300 {
		err = json.Unmarshal(text, answer)
	}
	if err != nil {
		return resp.StatusCode, doubtful(method, nucleus.Errorf(nucleus.KindFailed, "create_pr: %s answered %s without JSON", pr.API, resp.Status))
	}
	if resp.StatusCode >= 300 {
		var failed struct {
			Message string `json:"message"`
		}
		_ = json.Unmarshal(text, &failed) // without one the status has to do
		return resp.StatusCode, nucleus.Errorf(nucleus.KindFailed, "create_pr: %s answered %s: %s", pr.API, resp.Status, cut(failed.Message, 500))
	}
	return resp.StatusCode, nil
}

// doubtful is an error of a request whose answer did not come, or cannot be read: one that
// changes something may have done so.
func doubtful(method string, err error) error {
	if method == http.MethodGet || method == http.MethodHead {
		return err
	}
	return &unsure{err}
}
