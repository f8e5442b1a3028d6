"""The chaos program: thousands of calls while a seeded schedule kills, stops and cuts everything.

``make chaos`` runs it; ``python -m chaos --help`` says with what. The seed decides what is called,
what is broken and when. What comes of it is judged from records: what the client saw, what each run
of a call left in a file of its own, what the orchestrator's history tells, and which connections
were lost (``verdict.py`` has the rules).
"""
