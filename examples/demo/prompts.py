"""What the student is asked: short, plain questions that a small model can have a go at."""

PROMPTS = (
    "Why does the moon seem to change its shape over a month?",
    "Write two sentences that recommend a rainy-day activity for a six-year-old.",
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better.",
    "A shop sells pens at 2 euros each. How much do 7 pens cost, and why?",
    "Explain to a friend what a computer program is.",
    "How do bees make honey?",
    "Write a short, polite message to tell a colleague that the meeting is moved to Thursday.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Describe the smell of a bakery early in the morning.",
    "What should I check before I buy a used bicycle?",
    "Name four planets and say one thing about each.",
    "Turn this into a question: The library opens at nine.",
    "How do I boil an egg so that the yolk stays soft?",
    "Why do leaves turn red and yellow in autumn?",
    "Summarise in one sentence why washing your hands matters.",
)
